"""StyleGAN-T (Sauer et al. 2023, arXiv 2301.09515): a style-based generator, and a discriminator of heads on the tokens
of a frozen network. Like Aurora it draws an image in one pass, but without attention and without experts.

In this order: the generator, the discriminator, the losses, and StyleGANT, the system that a run trains. With the
authors' weights the networks reproduce the authors' outputs (tests/baselines/test_stylegan_t.py).

Differences from the paper:
- The default sizes are for a CPU: see CHANNELS, and one pair of layers each. The text code is that of the small CLIP.
- The frozen network is an EfficientNet-lite0, as DINO's weights need a download. Its taps have unequal numbers of
  tokens, so losses are means over tokens, then over taps. For DINO that equals the paper's losses.
- The second phase, in which the text encoder learns and the generator is frozen, is left out.
- In a step both networks learn from the same fake images, with the same augmentation, which is augment.py's. Its
  cutout hides a quarter of the picture; the authors' hides a 25th.
- The frozen network sees pictures of 64×64 pixels. The authors enlarge them to 224×224.
- To-RGB starts at a tenth of the authors' scale. At theirs, pixels begin with a standard deviation of 7 and are still
  out of range after 350 steps, because the frozen network hardly distinguishes degrees of extreme brightness.
- The blur starts at a sixteenth of the side and fades in 10,000 images. The paper's 32 pixels would be the whole image.
  σ is its standard deviation; the authors' blur of the same σ is 0.85 times as wide.
- There are no random crops, neither for the frozen network nor for the guidance: they are for larger images.
- Both losses of the generator are means over the batch. The authors' code accumulates gradients and averages only one.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.transforms.functional import gaussian_blur

from augment import NUM_CHANCES, augment
from aurora import FourierFeatures
from baselines.shared import System, main
from common.cli import UserError
from layers import Linear, lrelu, rms_norm, upsample
from modulation import Affine, ModulatedConv2d, ToRGB, UpsamplingConv2d
from weights.efficientnet import load_efficientnet

FIRST = 8  # the lowest resolution
CHANNELS = {8: 256, 16: 128, 32: 64, 64: 32}  # {resolution: channels}, a size for a CPU
LAYER_GAIN = math.sqrt(0.5)  # of all layers except those that upsample
MAX_ACTIVATION = 256  # prevents overflow in half precision

ADAM = dict(lr=2e-3, betas=(0.0, 0.99))  # of both networks
EMA_HALF_LIFE = 10_000  # images, at a batch of 32
POLICY = ("color", "translation", "cutout")
BLUR_SHARE, BLUR_IMAGES = 1 / 16, 10_000  # the first σ as a share of the side; images until the blur is gone
GUIDANCE = 0.2


# ----------------------------------------------------------------------------------------------------------------------
# The generator (section 3.1).


class SecondOrderStyle(Affine):
    """w [B, w_dim] → the style m₁ ⊙ m₂ + m₃ [B, C], computed by one dense layer (section 3.1)."""

    def __init__(self, w_dim, channels):
        super().__init__(w_dim, 3 * channels, bias_init=1.0)

    def forward(self, w):
        m1, m2, m3 = super().forward(w).chunk(3, dim=-1)
        return m1 * m2 + m3


class SynthesisLayer(nn.Module):
    """A modulated convolution, noise and a leaky ReLU: [B, C, H, W] and w [B, w_dim] → [B, D, R, R].

    noise: "const", a map that belongs to the weights; or a torch.Generator, for a new map for each image.
    """

    def __init__(self, conv, resolution, w_dim, gain=LAYER_GAIN):
        super().__init__()
        self.conv, self.gain = conv, gain
        conv.style = SecondOrderStyle(w_dim, conv.weight.shape[2])
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))

    def forward(self, x, w, noise):
        x = self.conv(x, w)
        if noise == "const":
            x = x + self.noise_strength * self.noise_const
        else:
            x = x + self.noise_strength * torch.randn(len(x), 1, *x.shape[2:], generator=noise).to(x)
        return lrelu(x).clamp(-MAX_ACTIVATION, MAX_ACTIVATION) * self.gain


class ResidualLayer(SynthesisLayer):
    """A residual SynthesisLayer after a GroupNorm: (γ·layer(x) + x)·√2 with x = norm(input), and a small γ at first."""

    def __init__(self, channels, resolution, w_dim):
        super().__init__(ModulatedConv2d(channels, channels, 3, w_dim), resolution, w_dim)
        self.norm = nn.GroupNorm(32, channels)
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 1e-5))

    def forward(self, x, w, noise):
        x = self.norm(x)
        return (self.gamma * super().forward(x, w, noise) + x) * math.sqrt(2)


class Level(nn.Module):
    """One resolution: features of the level below [B, C, R/2, R/2] → features [B, D, R, R] and RGB [B, 3, R, R].

    depth: the number of pairs of a plain and a residual layer.
    """

    def __init__(self, in_channels, channels, resolution, depth, w_dim):
        super().__init__()
        self.up = None
        if resolution > FIRST:
            self.up = SynthesisLayer(UpsamplingConv2d(in_channels, channels, 3, w_dim), resolution, w_dim, gain=1.0)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(SynthesisLayer(ModulatedConv2d(channels, channels, 3, w_dim), resolution, w_dim))
            self.layers.append(ResidualLayer(channels, resolution, w_dim))
        self.to_rgb = ToRGB(channels, w_dim, num_kernels=1)
        self.to_rgb.style = SecondOrderStyle(w_dim, channels)
        nn.init.normal_(self.to_rgb.weight, std=0.1)

    def forward(self, x, w, noise):
        if self.up is not None:
            x = self.up(x, w, noise)
        for layer in self.layers:
            x = layer(x, w, noise)
        return x, self.to_rgb(x, w).clamp(-MAX_ACTIVATION, MAX_ACTIVATION)


class Mapping(nn.Module):
    """z [B, z_dim] ~ N(0, 1) → f(z) [B, z_dim]: two layers, the second one linear. The text is not an input."""

    def __init__(self, z_dim):
        super().__init__()
        self.layers = nn.ModuleList(Linear(z_dim, z_dim, lr_mul=0.01) for _ in range(2))

    def forward(self, z):
        return self.layers[1](lrelu(self.layers[0](rms_norm(z))))


class Generator(nn.Module):
    """z [B, z_dim] and text codes c [B, text_dim] of unit length → images [B, 3, R, R], about [−1, 1].

    channels: {resolution: channels}, each a multiple of 32, from 8×8 up. depth: pairs of layers at each resolution.
    """

    def __init__(self, channels, depth=1, z_dim=64, text_dim=64):
        super().__init__()
        self.z_dim, w_dim = z_dim, z_dim + text_dim
        self.mapping = Mapping(z_dim)
        self.register_buffer("x_avg", torch.zeros(z_dim))
        self.fourier = FourierFeatures(channels[FIRST], FIRST, w_dim)
        self.fourier.freqs *= 2  # bandwidth in waves a side; no frequency exceeds it, so none is damped as in StyleGAN3
        self.levels, in_channels = nn.ModuleList(), channels[FIRST]
        for resolution, out_channels in channels.items():
            self.levels.append(Level(in_channels, out_channels, resolution, depth, w_dim))
            in_channels = out_channels

    def latent(self, z, c, truncation=1.0):
        """w = [f(z) ‖ c], [B, z_dim + text_dim]. Truncation moves only f(z) to its mean (section 3.3)."""
        return torch.cat([torch.lerp(self.x_avg, self.mapping(z), truncation), c], dim=1)

    def synthesize(self, w, noise="const"):
        """w [B, z_dim + text_dim], the same for all layers → images."""
        x, image = self.fourier(w), None
        for level in self.levels:
            x, rgb = level(x, w, noise)
            image = rgb if image is None else rgb + upsample(image)
        return image

    def forward(self, z, c, truncation=1.0, noise="const"):
        return self.synthesize(self.latent(z, c, truncation), noise)

    @torch.no_grad()
    def update_x_avg(self, w):
        """Moves the mean of f(z) toward that of a batch of w."""
        self.x_avg.lerp_(w[:, : self.z_dim].mean(0), 1 - 0.995)


# ----------------------------------------------------------------------------------------------------------------------
# The discriminator (section 3.2): heads on the tokens of a frozen network, as in Projected GANs (Sauer et al. 2021).


class FrozenFeatures(nn.Module):
    """Images [B, 3, R, R] in [−1, 1] → features of five stages of EfficientNet-lite0, the taps: tokens [B, C, N].

    Its weights never change; gradients pass through it to the images. side: the size to which images are resized.
    """

    channels = 16, 24, 40, 112, 320  # C of each tap

    def __init__(self, side=64):
        super().__init__()
        self.model, self.side = load_efficientnet(features_only=True), side

    def forward(self, images):
        images = F.interpolate(images, self.side, mode="bilinear", antialias=True)
        return [x.flatten(2) for x in self.model(images)]


class LocalBatchNorm(nn.Module):
    """Batch norm in ⌈B/8⌉ equal groups of samples, without running statistics: [B, C, N] → [B, C, N].

    Raises UserError if B is not a multiple of the number of groups.
    """

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        groups = math.ceil(len(x) / 8)
        if len(x) % groups:
            raise UserError(f"a batch of {len(x)} has no {groups} equal groups; give a multiple of 8, or at most 8")
        grouped = x.unflatten(0, (groups, -1)).transpose(1, 2)  # [G, C, B/G, N]
        grouped = F.instance_norm(grouped, weight=self.weight, bias=self.bias)
        return grouped.transpose(1, 2).flatten(0, 1)


class TokenConv(nn.Module):
    """A circular convolution along the tokens with spectral norm, local batch norm and leaky ReLU, over [B, C, N]."""

    def __init__(self, channels, kernel_size):
        super().__init__()
        conv = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, padding_mode="circular")
        self.conv = spectral_norm(conv)
        self.norm = LocalBatchNorm(channels)

    def forward(self, x):
        return F.leaky_relu(self.norm(self.conv(x)), 0.2)


class Head(nn.Module):
    """Scores the tokens of one tap: x [B, C, N] and c [B, text_dim] → logits [B, N], by projection on the text."""

    def __init__(self, channels, text_dim, dim=64):
        super().__init__()
        self.pointwise = TokenConv(channels, 1)
        self.mixing = TokenConv(channels, 9)
        self.to_code = spectral_norm(nn.Conv1d(channels, dim, 1))
        self.text = Linear(text_dim, dim)

    def forward(self, x, c):
        h = self.pointwise(x)
        h = (self.mixing(h) + h) / math.sqrt(2)
        h, text = self.to_code(h), self.text(c)  # [B, dim, N], [B, dim]
        return (h * text[..., None]).sum(1) / math.sqrt(text.shape[1])


class Discriminator(nn.Module):
    """Tokens [B, C, N] of each tap and text codes c [B, text_dim] → logits [B, N] of each; larger means more real.

    channels: C of each tap. The frozen network is not part of this module.
    """

    def __init__(self, channels, text_dim=64):
        super().__init__()
        self.heads = nn.ModuleList(Head(c, text_dim) for c in channels)

    def forward(self, taps, c):
        return [head(x, c) for head, x in zip(self.heads, taps, strict=True)]


def mean_logit(logits):
    """The mean over tokens and samples, then over taps."""
    return torch.stack([x.mean() for x in logits]).mean()


def hinge_loss(logits, sign):
    """The mean of max(0, 1 + sign·D) over tokens (section 3.2). sign: −1 for real images, +1 for fake ones."""
    return mean_logit([F.relu(1 + sign * x) for x in logits])


def spherical_distance(x, y):
    """arccos²(x·y) of directions [B, D] → [B], in [0, π²] (section 3.3)."""
    cosine = F.cosine_similarity(x, y, dim=-1)
    return cosine.clamp(-1 + 1e-6, 1 - 1e-6).arccos().square()  # at ±1 the slope of arccos is infinite


def blur(images, sigma):
    """A Gaussian blur of σ pixels, cut at 3σ, of images [B, 3, R, R]."""
    radius = math.floor(3 * sigma)
    return gaussian_blur(images, 2 * radius + 1, sigma) if radius else images


def blur_sigma(images_seen, resolution):
    """σ of the discriminator's blur in pixels. It falls linearly to 0 at BLUR_IMAGES."""
    return BLUR_SHARE * resolution * max(0.0, 1 - images_seen / BLUR_IMAGES)


class StyleGANT(System):
    """StyleGAN-T, a style-based GAN without attention."""

    def __init__(self, clip, resolution, device):
        self.features = FrozenFeatures().to(device)
        text_dim = clip.read(["text"]).embedding.shape[1]
        generator = Generator({r: c for r, c in CHANNELS.items() if r <= resolution}, text_dim=text_dim)
        discriminator = Discriminator(self.features.channels, text_dim)
        super().__init__(clip, resolution, device, ADAM, generator=generator, discriminator=discriminator)

    def step(self, number, images, text, noise):
        generator, discriminator, c = self.networks.generator, self.networks.discriminator, text.embedding
        w = generator.latent(self.sample_z(len(images), noise), c)
        fake = generator.synthesize(w, noise)
        sigma = blur_sigma(number * len(images), self.resolution)
        chances = torch.rand(2, len(images), NUM_CHANCES, generator=noise)
        with torch.no_grad():
            real_taps = self.see(images, sigma, chances[0])
        fake_taps = self.see(fake, sigma, chances[1])

        real_logits, fake_logits = discriminator(real_taps, c), discriminator([x.detach() for x in fake_taps], c)
        d_loss = hinge_loss(real_logits, -1) + hinge_loss(fake_logits, 1)
        self.minimize("discriminator", d_loss)

        adversarial = -mean_logit(discriminator(fake_taps, c))
        distance = spherical_distance(self.clip.encode_image(fake), c).mean()
        g_loss = adversarial + GUIDANCE * distance
        self.minimize("generator", g_loss)
        generator.update_x_avg(w)
        self.update_average(number, len(images), EMA_HALF_LIFE)
        report = {"d_loss": d_loss, "g_loss": g_loss, "g_adversarial": adversarial, "g_clip": distance}
        return report | {"logits_real": mean_logit(real_logits), "logits_fake": mean_logit(fake_logits)}

    def see(self, images, sigma, chances):
        """The taps of blurred and augmented images."""
        return self.features(augment({self.resolution: blur(images, sigma)}, POLICY, chances)[self.resolution])


if __name__ == "__main__":
    main(StyleGANT)
