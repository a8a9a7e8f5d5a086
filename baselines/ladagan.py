"""LadaGAN (Morales-Juarez and Fuentes-Pineda 2024, arXiv 2401.09596): a small GAN of transformer blocks whose attention
is additive, so that its cost grows with the number of feature points N, not with N².

Read from the top down: the attention, the generator, the discriminator, the losses, then LadaGAN, which a run trains.
With the authors' weights the networks give the authors' outputs (tests/baselines/test_ladagan.py).

Differences from the paper:
- The paper is unconditional. Our extension: the generator's noise is [z ‖ text], the text of unit RMS, and the
  discriminator adds a projection on the text (Miyato and Koyama 2018). Without a text both are the paper's.
- The default sizes are for a CPU: 384 channels at 8×8 rather than 1024, and 5.2 M parameters in the generator.
- R1 is computed once in 16 steps and weighed by 16. Its weight is the paper's, which was chosen for a batch of 128; it
  should be chosen again for other resolutions.
- The augmentation is augment.py's. There is no consistency regularization, which is optional in the paper.
- Truncation, which scales z, is ours.
"""

import itertools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))  # for `python baselines/ladagan.py`

from attention import merge_heads, split_heads
from augment import NUM_CHANCES, augment
from baselines.shared import System, main, minimize, update_average
from layers import rms_norm
from losses import R1_INTERVAL

FIRST, LAST = 8, 32  # the sides of the generator's first and last block
TOP = 16  # the side at which the discriminator has its block
LR, BETAS = 2e-4, (0.5, 0.99)  # of both networks
EMA_HALF_LIFE = 22_000  # images: the decay of 0.999 a step, once 440,000 images are seen
R1_WEIGHT = 1e-4
POLICY = ("color", "translation")

# Of the sizes for a CPU: the generator's, and the channels of the discriminator at R and at each halving down to 16×16.
WIDTH, HIDDEN, Z_DIM = 384, 512, 64
CHANNELS = {32: (64, 128), 64: (32, 64, 128)}


# ----------------------------------------------------------------------------------------------------------------------
# Ladaformer: a transformer block with additive attention.


def to_map(x):
    """Points of a square [B, N, C], row by row → its map [B, C, H, W]."""
    side = math.isqrt(x.shape[1])
    return x.transpose(1, 2).unflatten(2, (side, side))


def to_points(x):
    """[B, C, H, W] → [B, N, C]."""
    return x.flatten(2).transpose(1, 2)


class AdditiveAttention(nn.Module):
    """Additive attention over feature points, [B, N, C] → the same, with cost linear in N (Fastformer, Wu et al. 2021).

    The queries are summed up in one global query a head, q̄ = Σₙ αₙ qₙ, where α is a softmax over the points. A point's
    result is its key and its value times q̄, so points see each other through q̄ alone.
    """

    def __init__(self, channels, num_heads):
        super().__init__()
        self.num_heads, self.scale = num_heads, math.sqrt(channels // num_heads)
        self.to_qkv = nn.Linear(channels, 3 * channels)  # rows: all of q, all of k, all of v
        self.to_weight = nn.Linear(channels, num_heads)  # of a whole query
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x):
        return self.proj_out(self.mix(x))

    def mix(self, x):
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        weights = (self.to_weight(q) / self.scale).softmax(1)  # [B, N, heads], sum to one over the points
        q, k, v = (split_heads(t, self.num_heads) for t in (q, k, v))  # [B, heads, N, d]
        global_query = weights.transpose(1, 2)[:, :, None] @ q  # [B, heads, 1, d]
        return merge_heads(global_query * k * v)


class SelfModulatedNorm(nn.Module):
    """LN(x)·γ(h) + β(h) with h = ReLU(dense(code)): [B, N, C] and code [B, code_dim] → the same (Chen et al. 2019)."""

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
    """The generator's block, [B, N, C] and code [B, code_dim] → the same. Nothing passes beside its MLP."""

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
    """The discriminator's block, [B, N, C] → the same: pre-norm, with both residuals."""

    def __init__(self, channels, num_heads, hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = AdditiveAttention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = mlp(channels, hidden)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


# ----------------------------------------------------------------------------------------------------------------------
# The networks.


def orthogonal(module):
    """The paper's initialization, of every dense layer and convolution."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.orthogonal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Level(nn.Module):
    """One block of the generator, and the step up: [B, C, side, side] → [B, out_channels, factor·side, factor·side].

    The step is a pixel shuffle, which turns channels into resolution, and a 3×3 convolution.
    """

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
    """z [B, z_dim] ~ N(0, 1) and, where it is conditional, text [B, text_dim] → images [B, 3, R, R], about [−1, 1].

    width: channels at 8×8; a quarter of it at 16×16, a sixteenth at 32×32, and as many at R as a pixel shuffle from
    there leaves. num_heads, hidden: of the three blocks, and of their MLPs.
    """

    def __init__(self, resolution, width=WIDTH, num_heads=(4, 4, 4), hidden=(HIDDEN,) * 3, z_dim=Z_DIM, text_dim=0):
        super().__init__()
        self.z_dim, code_dim = z_dim, z_dim + text_dim
        self.start = nn.Linear(code_dim, FIRST**2 * width, bias=False)
        self.levels = nn.ModuleList()
        for i, side in enumerate((8, 16, 32)):
            channels = width // 4**i
            factor, out_channels = (2, channels // 4) if side < LAST else (resolution // LAST, 3)
            self.levels.append(Level(side, channels, num_heads[i], hidden[i], code_dim, factor, out_channels))
        self.apply(orthogonal)

    def forward(self, z, text=None):
        code = z if text is None else torch.cat([z, rms_norm(text)], dim=1)
        x = to_map(self.start(code).unflatten(1, (FIRST**2, -1)))
        for level in self.levels:
            x = level(x, code)
        return x


class DownBlock(nn.Module):
    """Two convolutions, averaged with a pooled shortcut: [B, C, H, W] → [B, D, H/2, W/2]."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(0.2),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(0.2),
        )
        self.direct = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(0.2),
        )

    def forward(self, x):
        return (self.main(x) + self.direct(x)) / 2


class Discriminator(nn.Module):
    """Images [B, 3, R, R] in [−1, 1] and, where it is conditional, text [B, text_dim] → logits [B, 25] of patches.

    channels: of the stem at R, and of each halving down to 16×16, where the block is. code_channels: at 8×8, after a
    pixel unshuffle and a 3×3 convolution; logit_channels: of the points that the last convolution reads, 4×4 a patch.
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
        if text is not None:  # our extension: a projection of what each patch holds on the text
            direction = self.text(rms_norm(text))[..., None, None]
            logits = logits + (F.avg_pool2d(x, 4, 1) * direction).sum(1, keepdim=True) / math.sqrt(x.shape[1])
        return logits.flatten(1)


# ----------------------------------------------------------------------------------------------------------------------
# The losses and the system.


def r1_penalty(discriminator, images, text):
    """R1 (Mescheder et al. 2018): the mean over the images of ‖∇ Σ logits‖², a scalar."""
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(images, text).sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


class LadaGAN(System):
    """LadaGAN as a run trains it, see System. It reads the embedding of CLIP."""

    def __init__(self, clip, resolution, device):
        text_dim = clip.read(["text"]).embedding.shape[1]
        generator = Generator(resolution, text_dim=text_dim)
        discriminator = Discriminator(CHANNELS[resolution], text_dim=text_dim)
        super().__init__(clip, resolution, device, generator, discriminator, LR, BETAS)

    def step(self, number, images, text, noise):
        generator, discriminator = self.networks["generator"], self.networks["discriminator"]
        c = text.embedding
        fake = generator(self.sample_z(len(images), noise), c)
        chances = torch.rand(2, len(images), NUM_CHANCES, generator=noise)
        real, fake = (
            augment({self.resolution: x}, POLICY, chances[n])[self.resolution] for n, x in enumerate((images, fake))
        )
        real_logits, fake_logits = discriminator(real, c), discriminator(fake.detach(), c)
        d_loss = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
        report = {"d_adversarial": d_loss, "logits_real": real_logits.mean(), "logits_fake": fake_logits.mean()}
        if number % R1_INTERVAL == 0:
            report["r1"] = r1_penalty(discriminator, real, c)
            d_loss = d_loss + R1_INTERVAL * R1_WEIGHT * report["r1"]
        minimize(self.optimizers["discriminator"], d_loss)

        g_loss = F.softplus(-discriminator(fake, c)).mean()
        minimize(self.optimizers["generator"], g_loss)
        update_average(self.networks["ema"], generator, number, len(images), EMA_HALF_LIFE)
        return {name: value.detach() for name, value in {"d_loss": d_loss, "g_loss": g_loss, **report}.items()}

    @torch.no_grad()
    def draw(self, z, text, truncation=1.0):
        return self.networks["ema"](truncation * z, text.embedding).clamp(-1, 1)


if __name__ == "__main__":
    main(LadaGAN)
