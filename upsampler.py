"""Aurora's second stage: a picture of 64×64 and its text become one of 256×256 or 512×512.

The paper trains such a stage without further details. This one follows GigaGAN's upsampler (section 3.5 there): the
synthesis network becomes an asymmetric U-Net. Its decoder has the base's parts: modulation by w, adaptive kernels, L2
attention, cross-attention to the local text, and sparse experts. It learns from real pictures averaged down.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from aurora import ConvBlock, Generator, Synthesis
from layers import Conv2d, Downsample, ResidualBlock, lrelu, resize
from presets import GeneratorConfig, UpsamplerConfig

KEPT = 8  # pixels of the input image; larger structures stay as they are
SPACING = 4  # pixels of the input image between the independent distortions of `distort`


class Encoder(nn.Module):
    """Images [B, 3, R, R] → feature maps {resolution: [B, C, r, r]}, from R down to the lowest level's resolution.

    Plain residual convolutions, without w and text. The maps have the channels of the levels that they are added to;
    concatenation would need one more convolution at each resolution.
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
    """×2, bilinear, which is the filter [1, 3, 3, 1]; the border repeats."""
    return F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)


def add_detail(rgb, image, side):
    """The RGB of a level [B, 3, 2R, 2R] and the image below [B, 3, R, R] → the image at 2R.

    side: of the upsampler's input image, or of its crop, in pixels.

    Adds the RGB minus a blurred copy of it, which has only what is coarser than about KEPT pixels of the input. So the
    large picture keeps the colors of the small one, and the network can redraw its shapes. Otherwise early steps of
    training would shift colors that are right.
    """
    coarse = F.interpolate(resize(rgb, max(1, side // KEPT)), rgb.shape[-1], mode="bilinear", align_corners=False)
    return rgb - coarse + enlarge(image)


class UNet(Synthesis):
    """The image, w and the local text → images at every resolution above the image's. Before training these are the
    image, interpolated.
    """

    def __init__(self, config: UpsamplerConfig):
        super().__init__(config, start=ConvBlock)
        self.encoder, self.input_noise = Encoder(config), config.input_noise

    def forward(self, image, noise, w, local_text, resolution=None):
        """image, noise: [B, 3, S, S] with S = input_resolution, or the side of a crop; the rest as in Synthesis.

        The encoder sees the image with noise added, so that generated pictures do not look different from real ones
        (GigaGAN, section 3.5). The interpolated image has no noise.
        """
        encoded = self.encoder(image + self.input_noise * noise)
        x = encoded.pop(min(encoded))  # the lowest features go up; the others join them on the way
        add = functools.partial(add_detail, side=image.shape[-1])
        return self.up(w, local_text, resolution, x=x, encoded=encoded, image=image, add=add)


class Upsampler(Generator):
    """The second stage. forward: image [B, 3, S, S] in [−1, 1], as in UNet; noise ~ N(0, 1) of its shape; then as
    Generator → Output, whose pyramid contains the resolutions above the image's.
    """

    def __init__(self, config: UpsamplerConfig):
        super().__init__(config, synthesis=UNet)

    def forward(self, image, noise, z, tokens, eot, resolution=None):
        global_text, local_text = self.text_head(tokens, eot)
        w = self.mapping(z, global_text)
        return self.synthesis(image, noise, w, local_text, resolution)


# ----------------------------------------------------------------------------------------------------------------------
# What differs between the stages for code that trains or samples either of them.


def given_images(config, images, noise):
    """The inputs of a generator before z and text: () for the base; for an upsampler the images [B, 3, R, R], averaged
    down to its input's resolution, and their noise from draw_input_noise.
    """
    if not isinstance(config, UpsamplerConfig):
        return ()
    return resize(images, config.input_resolution), noise.to(images)


def draw_input_noise(config, count, generator):
    """N(0, 1) for `count` input images of an upsampler, from a torch.Generator on the CPU. For the base, which
    has no input image, an empty tensor with `count` rows, so that callers need no case for it. Sampling uses the same
    noise for all pictures, see sampling/latent.py.
    """
    side = config.input_resolution if isinstance(config, UpsamplerConfig) else 0
    return torch.randn(count, 3, side, side, generator=generator)


def draw_distortions(config, count, generator):
    """N(0, 1) for `distort`, as draw_input_noise, times the strength of each image's distortion, from 0 to 1."""
    side = config.input_resolution // SPACING if isinstance(config, UpsamplerConfig) else 0
    strength = torch.rand(count, 1, 1, 1, generator=generator)
    return strength * torch.randn(count, 5, side, side, generator=generator)


def distort(images, distortions, config):
    """Bends and stains images [B, 3, S, S] by smooth displacements and smooth changes of color, whose standard
    deviations are at most about config.input_bend pixels and config.input_stain.

    The first stage draws wavy edges and mottled areas, and pictures averaged down have none. An upsampler that learns
    from distorted inputs corrects both. The strength differs, so it also learns to leave a clean picture alone.
    """
    side = images.shape[-1]
    smooth = F.interpolate(distortions, side, mode="bicubic", align_corners=False)
    moves, stains = smooth.split([2, 3], 1)
    unmoved = torch.eye(2, 3, device=images.device, dtype=images.dtype).expand(len(images), 2, 3)
    grid = F.affine_grid(unmoved, list(images.shape), align_corners=False)
    grid = grid + moves.permute(0, 2, 3, 1) * config.input_bend * 2 / side
    bent = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return (bent + config.input_stain * stains).clamp(-1, 1)


def crop(images, input_resolution, side, places):
    """Cuts a square from each of images [B, 3, R, R], at the same place of the picture for any R. With a side of 32 and
    an input of 64 pixels, it cuts 32×32 pixels of the input, and 128×128 of the image of 256×256.

    places [B, 2], on the CPU, uniform in [0, 1): of the squares.
    """
    scale = images.shape[-1] // input_resolution
    corners = ((places * (input_resolution - side + 1)).long() * scale).tolist()
    cuts = [image[:, y : y + side * scale, x : x + side * scale] for image, (y, x) in zip(images, corners, strict=True)]
    return torch.stack(cuts)


def new_generator(config: GeneratorConfig):
    """The network that a config of either stage describes, with random weights."""
    return Upsampler(config) if isinstance(config, UpsamplerConfig) else Generator(config)
