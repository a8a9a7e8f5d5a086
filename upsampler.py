"""Aurora's second stage: a picture of 64×64 and its text become one of 256×256 or 512×512.

The paper trains such a stage, and says no more. This one follows GigaGAN's upsampler (section 3.5 there): the synthesis
network becomes an asymmetric U-Net. What the base has, this has too: w from noise and text modulates the way up, with
adaptive kernels, L2 attention, the local text, and sparse experts. It learns from real pictures averaged down.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from aurora import ConvBlock, Generator, Synthesis
from layers import Conv2d, Downsample, ResidualBlock, lrelu, resize
from presets import GeneratorConfig, UpsamplerConfig


class Encoder(nn.Module):
    """The way down: images [B, 3, R, R] → {resolution: maps [B, C, r, r]}, from R to the lowest level's.

    Plain residual convolutions, which see neither w nor the text. The maps have the channels of the levels that they
    are added to; to concatenate them would need one more convolution at each resolution.
    """

    def __init__(self, config: UpsamplerConfig):
        super().__init__()
        levels = [level for level in reversed(config.levels) if level.resolution <= config.input_resolution]
        channels = [level.channels for level in levels]
        self.resolutions = [level.resolution for level in levels]
        self.from_rgb = Conv2d(3, channels[0], 3)
        self.steps = nn.ModuleList(map(Downsample, channels[:-1], channels[1:]))
        self.bodies = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(c) for _ in range(config.encoder_blocks))) for c in channels
        )

    def forward(self, image):
        x = lrelu(self.from_rgb(image))
        maps = {}
        for resolution, step, body in zip(self.resolutions, [nn.Identity(), *self.steps], self.bodies, strict=True):
            x = maps[resolution] = body(step(x))
        return maps


def enlarge(image):
    """×2, bilinear, with borders that repeat: the filter [1, 3, 3, 1]."""
    return F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)


def add_detail(rgb, image, side):
    """The RGB of a level [B, 3, 2R, 2R] and the image below [B, 3, R, R] → the image at 2R.

    Only that part of the RGB is added which an image of side × side, the input's resolution, cannot show. So the large
    picture keeps the colors of the small one; otherwise early steps would shift colors that are right already.
    """
    coarse = F.interpolate(resize(rgb, side), rgb.shape[-1], mode="bilinear", align_corners=False)
    return rgb - coarse + enlarge(image)


class UNet(Synthesis):
    """The image, w and the local text → images at every resolution above it, which begin as its interpolation."""

    def __init__(self, config: UpsamplerConfig):
        super().__init__(config, first_block=ConvBlock)
        self.encoder, self.input_noise = Encoder(config), config.input_noise

    def forward(self, image, noise, w, local_text, resolution=None):
        """image, noise: [B, 3, input_resolution, input_resolution]; the rest as in Synthesis.

        The way down sees the image with noise on it, so pictures that a base generated do not look foreign (GigaGAN,
        section 3.5). What is interpolated is the image as it is.
        """
        encoded = self.encoder(image + self.input_noise * noise)
        x = encoded.pop(min(encoded))
        add = functools.partial(add_detail, side=image.shape[-1])
        return self.up(w, local_text, resolution, x, encoded, image, add)


class Upsampler(Generator):
    """The second stage. forward: image [B, 3, 64, 64] in [−1, 1]; noise ~ N(0, 1) of its shape; and what the base is
    given → Output, whose pyramid holds the resolutions above the image's.
    """

    def __init__(self, config: UpsamplerConfig):
        super().__init__(config, synthesis=UNet)

    def forward(self, image, noise, z, tokens, eot, resolution=None):
        global_text, local_text = self.text_head(tokens, eot)
        w = self.mapping(z, global_text)
        return self.synthesis(image, noise, w, local_text, resolution)


# ----------------------------------------------------------------------------------------------------------------------
# What tells the stages apart for those who train and draw with either.


def given_images(config, images, noise):
    """What a generator of this config is given beside z and text: () for the base; for an upsampler images [B, 3, R, R]
    averaged down to its input's resolution, and draw_input_noise's, in training as in sampling.
    """
    if not isinstance(config, UpsamplerConfig):
        return ()
    return resize(images, config.input_resolution), noise.to(images)


def draw_input_noise(config, count, generator):
    """N(0, 1) for `count` images that an upsampler is given, from a torch.Generator on the CPU; nothing for a base."""
    shape = (3, config.input_resolution, config.input_resolution) if isinstance(config, UpsamplerConfig) else (0,)
    return torch.randn(count, *shape, generator=generator)


def crop(images, size, side, places):
    """Each of images [B, 3, R, R] cut to what a square of `side` pixels covers in a picture of `size` pixels, → [B, 3,
    side·R/size, side·R/size]; places [B, 2], uniform in [0, 1), say where. So all resolutions are cut alike.
    """
    scale = images.shape[-1] // size
    corners = ((places * (size - side + 1)).long() * scale).tolist()
    cuts = [image[:, y : y + side * scale, x : x + side * scale] for image, (y, x) in zip(images, corners, strict=True)]
    return torch.stack(cuts)


def new_generator(config: GeneratorConfig):
    """The network that a config describes, of either stage."""
    return Upsampler(config) if isinstance(config, UpsamplerConfig) else Generator(config)
