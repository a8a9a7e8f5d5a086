"""Muse (Chang et al. 2023, arXiv 2301.00704): an image is a grid of tokens, which a transformer fills in a few steps.

A VQGAN turns images into tokens and back. The transformer reads a caption and an image with some tokens masked, and
learns to predict those. Parallel decoding starts with all tokens masked. In each step it predicts all of them and keeps
the most certain ones.

Differences from the paper:
- Aurora's frozen CLIP reads the text, not T5-XXL. The transformer still sees all of its tokens.
- Sizes are for one CPU core: the VQGAN shrinks images by 4 instead of 16 and has 32 channels at first instead of 128
  and 1024 codes instead of 8192; the transformer is small.
- The second transformer, which draws more tokens given those of the first, is left out.
- The learning rate is 5·10⁻⁴ for all networks, and the VQGAN's perceptual loss, on maps of the small CLIP, weighs 0.2.
- Codes that no image uses are moved to vectors of images (Codebook.restart).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from attention import merge_heads, split_heads
from baselines.shared import System, main
from common.cli import UserError
from losses import perceptual_distance

# The VQGAN.
FACTOR = 4  # pixels on a side of a token
CHANNELS = (32, 64, 64)  # at R, R/2 and R/4
NUM_CODES, CODE_DIM = 1024, 32
LOSS_WEIGHTS = {"reconstruction": 1, "perceptual": 0.2, "adversarial": 0.1, "codebook": 1}
COMMITMENT = 0.25  # its weight within the codebook's loss
USAGE_DECAY, DEAD = 0.95, 0.05  # a code is dead if its usage is below this share of the mean
TOKENIZER_IMAGES = 40_000  # images for the VQGAN; after them it is frozen, and the transformer learns

# The transformer.
DIM, NUM_LAYERS, NUM_HEADS = 256, 6, 8
TEXT_DROP = 0.1  # share of images whose text is left out, for guidance
EMA_HALF_LIFE = 10_000  # images
ADAM = dict(lr=5e-4, betas=(0.9, 0.99), fused=True)  # of all networks

# Decoding.
MASK = -1  # in place of an unknown token
STEPS = 24
TEMPERATURE = 4.5  # scale of the confidence's noise at the first step
GUIDANCE = 3.0


# ----------------------------------------------------------------------------------------------------------------------
# The VQGAN (Esser et al. 2021): fully convolutional, so it accepts images of any size.


class ResidualBlock(nn.Module):
    """Two convolutions and a skip connection, [B, C, H, W] → [B, D, H, W]."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        first = nn.GroupNorm(8, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        second = nn.GroupNorm(8, out_channels), nn.SiLU(), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.branch = nn.Sequential(*first, *second)

    def forward(self, x):
        return self.skip(x) + self.branch(x)


def encoder(channels, code_dim):
    """Images [B, 3, R, R] → vectors [B, code_dim, R/4, R/4]: two residual blocks a level, strided steps between."""
    layers, width = [nn.Conv2d(3, channels[0], 3, padding=1)], channels[0]
    for level, wider in enumerate(channels):
        if level > 0:
            layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2))
        layers += [ResidualBlock(width, wider), ResidualBlock(wider, wider)]
        width = wider
    return nn.Sequential(*layers, nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, code_dim, 1))


def decoder(channels, code_dim):
    """Vectors [B, code_dim, H, W] → images [B, 3, 4H, 4W]: the encoder in reverse."""
    layers, width = [nn.Conv2d(code_dim, channels[-1], 3, padding=1)], channels[-1]
    for level, narrower in enumerate(reversed(channels)):
        if level > 0:
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, narrower, 3, padding=1)]
        layers += [ResidualBlock(narrower, narrower), ResidualBlock(narrower, narrower)]
        width = narrower
    return nn.Sequential(*layers, nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))


class Codebook(nn.Module):
    """K vectors, the codes. A token is the index of the nearest code."""

    def __init__(self, num_codes, code_dim):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(num_codes, code_dim))
        self.register_buffer("usage", torch.zeros(num_codes))  # running mean of each code's share of vectors, times K

    def nearest(self, z):
        """Vectors [..., D] → tokens [...]. |z − e|² without |z|², which is the same for all codes."""
        return (self.codes.square().sum(1) - 2 * z @ self.codes.T).argmin(-1)

    def forward(self, z):
        """Vectors [B, D, H, W] → quantized [B, D, H, W], tokens [B, H, W], loss.

        Straight-through: the gradient of the quantized vectors reaches z unchanged. The loss moves codes toward their
        vectors and, with weight COMMITMENT, vectors toward their codes.
        """
        points = z.movedim(1, -1)
        tokens = self.nearest(points.detach())
        codes = self.codes[tokens]
        loss = F.mse_loss(codes, points.detach()) + COMMITMENT * F.mse_loss(points, codes.detach())
        quantized = points + (codes - points).detach()
        return quantized.movedim(-1, 1), tokens, loss

    @torch.no_grad()
    def restart(self, z, tokens, noise):
        """Moves dead codes to random vectors of the batch → the number of codes that the batch uses.

        A code without vectors gets no gradient, so it would stay dead. At the start only codes of the first batch live.
        """
        share = F.one_hot(tokens.flatten(), len(self.codes)).float().mean(0)
        self.usage.lerp_(share * len(self.codes), 1 - USAGE_DECAY)
        dead = self.usage < DEAD
        points = z.movedim(1, -1).flatten(0, -2)
        drawn = torch.randint(len(points), (len(self.codes),), generator=noise).to(z.device)
        self.codes.copy_(torch.where(dead[:, None], points[drawn], self.codes))
        self.usage.masked_fill_(dead, 1.0)
        return (share > 0).sum()


class VQGAN(nn.Module):
    """Encoder, codebook and decoder: images [B, 3, R, R] in [−1, 1] ↔ tokens [B, R/4, R/4]."""

    def __init__(self, channels=CHANNELS, num_codes=NUM_CODES, code_dim=CODE_DIM):
        super().__init__()
        self.encoder = encoder(channels, code_dim)
        self.codebook = Codebook(num_codes, code_dim)
        self.decoder = decoder(channels, code_dim)

    def encode(self, images):
        return self.codebook.nearest(self.encoder(images).movedim(1, -1))

    def decode(self, tokens):
        return self.decoder(self.codebook.codes[tokens].movedim(-1, 1)).clamp(-1, 1)


def patch_discriminator(width=32):
    """Images [B, 3, R, R] → logits [B, 1, R/4, R/4], one a patch; larger means more real."""
    first = nn.Conv2d(3, width, 4, padding=1, stride=2), nn.LeakyReLU(0.2)
    second = nn.Conv2d(width, 2 * width, 4, padding=1, stride=2), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2)
    return nn.Sequential(*first, *second, nn.Conv2d(2 * width, 1, 3, padding=1))


class Attention(nn.Module):
    """Attention of x [B, N, D] to a context [B, T, context_dim]. visible: an optional mask [B, 1, 1, T]."""

    def __init__(self, dim, context_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.proj_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x, context, visible=None):
        k, v = self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (split_heads(t, self.num_heads) for t in (self.to_q(x), k, v))
        return self.proj_out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=visible)))


class Block(nn.Module):
    """Self-attention, cross-attention to the text, MLP: pre-norm residuals over [B, N, D]."""

    def __init__(self, dim, text_width, num_heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attention = Attention(dim, dim, num_heads)
        self.cross_attention = Attention(dim, text_width, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, text, visible):
        h = self.norm1(x)
        x = x + self.self_attention(h, h)
        x = x + self.cross_attention(self.norm2(x), text, visible)
        return x + self.mlp(self.norm3(x))


class Transformer(nn.Module):
    """Tokens [B, side, side], some of them MASK, and clip.Text → logits [B, side, side, num_codes].

    Zeros in place of the text's tokens leave the text out: cross-attention has no biases, so it adds zero.
    """

    def __init__(self, side, text_width, num_codes=NUM_CODES, dim=DIM, num_layers=NUM_LAYERS, num_heads=NUM_HEADS):
        super().__init__()
        self.embedding = nn.Embedding(num_codes + 1, dim)  # row 0 is for MASK
        self.rows = nn.Parameter(torch.randn(side, 1, dim))
        self.columns = nn.Parameter(torch.randn(side, dim))
        self.blocks = nn.ModuleList(Block(dim, text_width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, num_codes)

    def forward(self, tokens, text):
        position = torch.arange(text.tokens.shape[1], device=tokens.device)
        visible = (position <= text.eot[:, None])[:, None, None]  # [B, 1, 1, T]; hides padding
        x = (self.embedding(tokens - MASK) + self.rows + self.columns).flatten(1, 2)  # [B, N, D]
        for block in self.blocks:
            x = block(x, text.tokens, visible)
        return self.to_logits(self.norm(x)).unflatten(1, tokens.shape[1:])


def mask_randomly(tokens, noise):
    """Masks a share r = cos(π/2·u) of each image's tokens [B, H, W], at least one; u is uniform in [0, 1)."""
    share = torch.cos(math.pi / 2 * uniform(tokens.shape[:1], noise, tokens.device))
    count = (share * tokens[0].numel()).clamp(min=1)
    return tokens.masked_fill(lowest(uniform(tokens.shape, noise, tokens.device), count), MASK)


def lowest(scores, count):
    """A mask of the `count` [B], rounded up, lowest of each image's scores [B, H, W]."""
    return scores.flatten(1).argsort(1).argsort(1).view_as(scores) < count[:, None, None]


def uniform(shape, noise, device):
    """Uniform numbers in [0, 1). noise: a torch.Generator on the CPU."""
    return torch.rand(shape, generator=noise).to(device)


def gumbel(shape, noise, device):
    """Standard Gumbel noise: argmax(logits + noise) is k with probability softmax(logits)ₖ."""
    return -torch.log(-torch.log(uniform(shape, noise, device).clamp(1e-20, 1 - 1e-7)))


def guided_logits(network, tokens, text, t):
    """ℓ = (1 + t)·ℓ_c − t·ℓ_u, logits [B, H, W, K] with and without the text."""
    conditional = network(tokens, text)
    unconditional = network(tokens, text._replace(tokens=torch.zeros_like(text.tokens)))
    return (1 + t) * conditional - t * unconditional


def keep_certain(tokens, drawn, confidence, count):
    """Replaces MASK by `drawn`, all [B, H, W], and masks the `count` [B] least certain of these. Known tokens stay."""
    unknown = tokens == MASK
    filled = torch.where(unknown, drawn, tokens)
    return filled.masked_fill(lowest(confidence.masked_fill(~unknown, math.inf), count), MASK)


def fill(network, tokens, text, noise, steps=STEPS, guidance=GUIDANCE):
    """Parallel decoding: tokens [B, H, W] → tokens with every MASK replaced.

    Of N₀ unknown tokens, N₀·cos(π/2·i/T) are masked after step i of T. Guidance rises linearly from 0: the first tokens
    are drawn freely, and later ones follow the text.
    """
    unknown = (tokens == MASK).sum((1, 2)).double()
    for step in range(steps):
        progress = (step + 1) / steps
        logits = guided_logits(network, tokens, text, guidance * (step / (steps - 1) if steps > 1 else 1))
        drawn = (logits + gumbel(logits.shape, noise, logits.device)).argmax(-1)
        certainty = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        confidence = certainty + TEMPERATURE * (1 - progress) * gumbel(drawn.shape, noise, logits.device)
        tokens = keep_certain(tokens, drawn, confidence, (unknown * math.cos(math.pi / 2 * progress)).floor())
    return tokens


class Muse(System):
    """Muse, a masked transformer over the tokens of a VQGAN.

    The VQGAN learns from the first TOKENIZER_IMAGES images, the transformer from the following ones.
    """

    averaged = "transformer"
    for_sampling = ("vqgan", "ema")

    def __init__(self, clip, resolution, device):
        learning = {"vqgan": VQGAN(), "discriminator": patch_discriminator()}
        learning["transformer"] = Transformer(resolution // FACTOR, clip.width)
        super().__init__(clip, resolution, device, ADAM, **learning)

    def step(self, number, images, text, noise):
        steps = math.ceil(TOKENIZER_IMAGES / len(images))
        if number < steps:
            return self.train_vqgan(images, noise)
        return self.train_transformer(images, text, noise, number - steps)

    def train_vqgan(self, images, noise):
        """A step of the VQGAN, then one of its discriminator (hinge losses)."""
        vqgan, discriminator = self.networks.vqgan, self.networks.discriminator
        z = vqgan.encoder(images)
        quantized, tokens, codebook_loss = vqgan.codebook(z)
        reconstructed = vqgan.decoder(quantized)
        with torch.no_grad():
            maps = self.clip.see(images)[1]
        report = {
            "reconstruction": F.l1_loss(reconstructed, images),
            "perceptual": perceptual_distance(self.clip.see(reconstructed)[1], maps).mean(),
            "adversarial": -discriminator(reconstructed).mean(),
            "codebook": codebook_loss,
        }
        report["vqgan_loss"] = sum(weight * report[name] for name, weight in LOSS_WEIGHTS.items())
        self.minimize("vqgan", report["vqgan_loss"])
        report["codes"] = vqgan.codebook.restart(z.detach(), tokens, noise)
        real, fake = discriminator(images), discriminator(reconstructed.detach())
        report["discriminator_loss"] = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        self.minimize("discriminator", report["discriminator_loss"])
        return report

    def train_transformer(self, images, text, noise, number):
        """Step `number` of the transformer."""
        with torch.no_grad():
            tokens = self.networks.vqgan.encode(images)
        shown = mask_randomly(tokens, noise)
        keep_text = uniform(text.eot.shape, noise, images.device) >= TEXT_DROP
        logits = self.networks.transformer(shown, text._replace(tokens=text.tokens * keep_text[:, None, None]))
        masked = shown == MASK
        targets = tokens.masked_fill(~masked, -1).flatten()  # only masked tokens count
        loss = F.cross_entropy(logits.flatten(0, -2), targets, ignore_index=-1)
        self.minimize("transformer", loss)
        self.update_average(number, len(images), EMA_HALF_LIFE)
        correct = ((logits.argmax(-1) == tokens) & masked).sum() / masked.sum()
        return {"transformer_loss": loss, "accuracy": correct, "masked": masked.float().mean()}

    def draw(self, text, noise, truncation):
        """An image for each caption. Raises UserError for a truncation other than 1, which Muse does not have."""
        if truncation != 1:
            raise UserError("--truncation: Muse does not have this option; leave it out")
        side = self.resolution // FACTOR
        tokens = torch.full((len(text.eot), side, side), MASK, device=self.device)
        return self.networks.vqgan.decode(fill(self.networks.ema, tokens, text, noise))


if __name__ == "__main__":
    main(Muse)
