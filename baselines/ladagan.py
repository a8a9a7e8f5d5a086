"""LadaGAN (Morales-Juarez and Fuentes-Pineda 2024, arXiv 2401.09596): a small GAN of transformer blocks with additive
attention, whose cost grows with the number of feature points N instead of N².

In this order: the attention, the generator, the discriminator, the losses, and LadaGAN, the system that a run trains.
With the authors' weights the networks reproduce the authors' outputs (tests/baselines/test_ladagan.py).

Differences from the paper:
- The paper is unconditional. We extend it: the generator's input is [z ‖ text], with text of unit RMS, and the
  discriminator adds a projection on the text (Miyato and Koyama 2018). Without a text both are the paper's.
- The default sizes are for a CPU: 384 channels at 8×8 instead of 1024, and 6.9 M parameters in the generator.
- R1 is computed in every 16th step and multiplied by 16. Its weight is the paper's, chosen for a batch of 128; other
  resolutions need another weight.
- The position codes start at zero; the authors' are random. Both networks learn from the same fake images.
- The augmentation is augment.py's. The consistency regularization, which is optional in the paper, is left out.
- Truncation, which scales z, is ours.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from attention import merge_heads, split_heads
from augment import NUM_CHANCES, augment
from baselines.shared import System, main
from layers import rms_norm
from losses import R1_INTERVAL

SIDES = 8, 16, 32  # of the generator's blocks
TOP = 16  # the side of the discriminator's block
ADAM = dict(lr=2e-4, betas=(0.5, 0.99))  # of both networks
EMA_HALF_LIFE = 22_000  # images: the paper's decay of 0.999 a step, after 440,000 images
R1_WEIGHT = 1e-4
POLICY = ("color", "translation")

# Sizes for a CPU: of the generator; and the discriminator's channels at R and after each halving down to 16×16.
WIDTH, HIDDEN, Z_DIM = 384, 512, 64
CHANNELS = {32: (64, 128), 64: (32, 64, 128)}


# ----------------------------------------------------------------------------------------------------------------------
# Ladaformer: a transformer block with additive attention.


def to_map(x):
    """[B, N, C] → [B, C, H, W], a square."""
    side = math.isqrt(x.shape[1])
    return x.transpose(1, 2).unflatten(2, (side, side))


def to_points(x):
    """[B, C, H, W] → [B, N, C]."""
    return x.flatten(2).transpose(1, 2)


class AdditiveAttention(nn.Module):
    """Additive attention over feature points, [B, N, C] → [B, N, C], linear in N (Fastformer, Wu et al. 2021).

    Each head has one global query q̄ = Σₙ αₙ qₙ, with α a softmax over the points. The result of point n is q̄ ⊙ kₙ ⊙ vₙ,
    so points see each other only through q̄.
    """

    def __init__(self, channels, num_heads):
        super().__init__()
        self.num_heads, self.scale = num_heads, math.sqrt(channels // num_heads)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_weight = nn.Linear(channels, num_heads)  # reads all heads of a query
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x):
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        weights = (self.to_weight(q) / self.scale).softmax(1)  # α: [B, N, heads]
        q, k, v = (split_heads(t, self.num_heads) for t in (q, k, v))  # [B, heads, N, d]
        global_query = weights.transpose(1, 2)[:, :, None] @ q  # [B, heads, 1, d]
        return self.proj_out(merge_heads(global_query * k * v))


class SelfModulatedNorm(nn.Module):
    """LN(x)·γ(h) + β(h) with h = ReLU(dense(code)) (Chen et al. 2019): [B, N, C] and code [B, code_dim] → [B, N, C]."""

    def __init__(self, channels, code_dim):
        super().__init__()
        self.hidden = nn.Linear(code_dim, channels)
        self.scale = nn.Linear(channels, channels)
        self.shift = nn.Linear(channels, channels)

    def forward(self, x, code):
        h = F.relu(self.hidden(code))[:, None]
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * self.scale(h) + self.shift(h)


def mlp(channels, hidden):
    return nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))


class ModulatedLadaformer(nn.Module):
    """The generator's block, [B, N, C] and code [B, code_dim] → [B, N, C]. Its MLP has no residual."""

    def __init__(self, channels, num_heads, hidden, code_dim):
        super().__init__()
        self.norm1 = SelfModulatedNorm(channels, code_dim)
        self.attention = AdditiveAttention(channels, num_heads)
        self.norm2 = SelfModulatedNorm(channels, code_dim)
        self.mlp = mlp(channels, hidden)

    def forward(self, x, code):
        x = x + self.attention(self.norm1(x, code))
        return self.mlp(self.norm2(x, code))


class Ladaformer(nn.Module):
    """The discriminator's block, [B, N, C] → [B, N, C]: pre-norm, with both residuals."""

    def __init__(self, channels, num_heads, hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = AdditiveAttention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = mlp(channels, hidden)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def orthogonal(module):
    """The paper's initialization of dense layers and convolutions."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.orthogonal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Level(nn.Module):
    """A block of the generator, a pixel shuffle and a 3×3 convolution: [B, C, side, side] → [B, D, factor·side, …]."""

    def __init__(self, side, channels, num_heads, hidden, code_dim, factor, out_channels):
        super().__init__()
        self.factor = factor
        self.position = nn.Parameter(torch.zeros(1, side**2, channels))
        self.block = ModulatedLadaformer(channels, num_heads, hidden, code_dim)
        self.conv = nn.Conv2d(channels // factor**2, out_channels, 3, padding=1)

    def forward(self, x, code):
        x = self.block(to_points(x) + self.position, code)
        return self.conv(F.pixel_shuffle(to_map(x), self.factor))


class Generator(nn.Module):
    """z [B, z_dim] ~ N(0, 1) and, if text_dim is given, text [B, text_dim] → images [B, 3, R, R], about [−1, 1].

    width: channels at 8×8; 16×16 has a quarter of them, 32×32 a sixteenth. num_heads, hidden: of the three blocks.
    """

    def __init__(self, resolution, width=WIDTH, num_heads=(4, 4, 4), hidden=(HIDDEN,) * 3, z_dim=Z_DIM, text_dim=0):
        super().__init__()
        self.z_dim, code_dim = z_dim, z_dim + text_dim
        self.start = nn.Linear(code_dim, SIDES[0] ** 2 * width, bias=False)
        self.levels = nn.ModuleList()
        for i, side in enumerate(SIDES):
            channels = width // 4**i
            factor, out_channels = (2, channels // 4) if side < SIDES[-1] else (resolution // side, 3)
            self.levels.append(Level(side, channels, num_heads[i], hidden[i], code_dim, factor, out_channels))
        self.apply(orthogonal)

    def forward(self, z, text=None, truncation=1.0):
        z = truncation * z
        code = z if text is None else torch.cat([z, rms_norm(text)], dim=1)
        x = to_map(self.start(code).unflatten(1, (SIDES[0] ** 2, -1)))
        for level in self.levels:
            x = level(x, code)
        return x


def conv(in_channels, out_channels, kernel_size, stride=1):
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return layer, nn.BatchNorm2d(out_channels), nn.LeakyReLU(0.2)


class DownBlock(nn.Module):
    """The mean of two convolutions and a pooled shortcut: [B, C, H, W] → [B, D, H/2, W/2]."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.main = nn.Sequential(*conv(in_channels, out_channels, 3, stride=2), *conv(out_channels, out_channels, 3))
        self.direct = nn.Sequential(nn.AvgPool2d(2), *conv(in_channels, out_channels, 1))

    def forward(self, x):
        return (self.main(x) + self.direct(x)) / 2


class Discriminator(nn.Module):
    """Images [B, 3, R, R] in [−1, 1] and, if text_dim is given, text [B, text_dim] → logits [B, 25], one a patch.

    channels: at R and after each halving down to 16×16. code_channels, logit_channels: at 8×8, where a patch is 4×4.
    """

    def __init__(self, channels, num_heads=4, hidden=256, code_channels=256, logit_channels=512, text_dim=0):
        super().__init__()
        top = channels[-1]
        self.stem = nn.Sequential(nn.Conv2d(3, channels[0], 3, padding=1, bias=False), nn.LeakyReLU(0.2))
        self.downs = nn.Sequential(*(DownBlock(i, o) for i, o in itertools.pairwise(channels)))
        self.position = nn.Parameter(torch.zeros(1, TOP**2, top))
        self.block = Ladaformer(top, num_heads, hidden)
        self.conv = nn.Conv2d(4 * top, code_channels, 3, padding=1)
        self.points = nn.Sequential(nn.Conv2d(code_channels, logit_channels, 1, bias=False), nn.LeakyReLU(0.2))
        self.to_logits = nn.Conv2d(logit_channels, 1, 4, bias=False)
        self.text = nn.Linear(text_dim, logit_channels) if text_dim else None
        self.apply(orthogonal)

    def forward(self, images, text=None):
        x = self.downs(self.stem(images))
        x = to_map(self.block(to_points(x) + self.position))
        x = self.points(self.conv(F.pixel_unshuffle(x, 2)))  # [B, C, 8, 8]
        logits = self.to_logits(x)
        if text is not None:  # our extension: a projection of each patch on the text
            direction = self.text(rms_norm(text))[..., None, None]
            logits = logits + (F.avg_pool2d(x, 4, 1) * direction).sum(1, keepdim=True) / math.sqrt(x.shape[1])
        return logits.flatten(1)


# ----------------------------------------------------------------------------------------------------------------------
# The losses and the system.


def r1_penalty(discriminator, images, text):
    """R1 (Mescheder et al. 2018): ‖∇ Σ logits‖², the mean over the images."""
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(images, text).sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


class LadaGAN(System):
    """LadaGAN, a GAN of transformer blocks with additive attention."""

    def __init__(self, clip, resolution, device):
        text_dim = clip.read(["text"]).embedding.shape[1]
        generator = Generator(resolution, text_dim=text_dim)
        discriminator = Discriminator(CHANNELS[resolution], text_dim=text_dim)
        super().__init__(clip, resolution, device, ADAM, generator=generator, discriminator=discriminator)

    def step(self, number, images, text, noise):
        generator, discriminator, c = self.networks.generator, self.networks.discriminator, text.embedding
        fake = generator(self.sample_z(len(images), noise), c)
        chances = torch.rand(2, len(images), NUM_CHANCES, generator=noise)
        real = augment({self.resolution: images}, POLICY, chances[0])[self.resolution]
        fake = augment({self.resolution: fake}, POLICY, chances[1])[self.resolution]
        real_logits, fake_logits = discriminator(real, c), discriminator(fake.detach(), c)
        d_loss = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
        report = {"d_adversarial": d_loss, "logits_real": real_logits.mean(), "logits_fake": fake_logits.mean()}
        if number % R1_INTERVAL == 0:
            report["r1"] = r1_penalty(discriminator, real, c)
            d_loss = d_loss + R1_INTERVAL * R1_WEIGHT * report["r1"]
        self.minimize("discriminator", d_loss)

        g_loss = F.softplus(-discriminator(fake, c)).mean()
        self.minimize("generator", g_loss)
        self.update_average(number, len(images), EMA_HALF_LIFE)
        return {"d_loss": d_loss, "g_loss": g_loss, **report}


if __name__ == "__main__":
    main(LadaGAN)
