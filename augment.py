"""Differentiable augmentation (DiffAugment, Zhao et al. 2020), for small data sets: the discriminator sees real and
generated images after the same random changes, so that it cannot learn the real ones by heart.

A change is the same at each resolution of a pyramid. Empty areas become grey. Because generated images are changed too,
the generator gains nothing by drawing grey.
"""

import torch
import torch.nn.functional as F

from common.cli import UserError
from layers import float32_region

# Uniform random numbers that decide how an image is changed: two for translation, then one for scale, three for color,
# two for cutout.
NUM_CHANCES = 8
MAX_SHIFT = 1 / 8  # as a share of the side
MAX_SCALE = 1.2  # the largest enlargement; 1/MAX_SCALE is the smallest
CUTOUT = 1 / 2  # the side of the grey square, as a share of the image's


def check(policy):
    """Raises UserError for names that are not in POLICIES."""
    for name in policy:
        if name not in POLICIES:
            raise UserError(f"--set augment: there is no {name}; choose from {', '.join(POLICIES)}")


def augment(pyramid, policy, chances):
    """Changes a pyramid {r: [B, 3, r, r]} of images in [−1, 1], or of crops of them → a pyramid.

    policy: names from POLICIES, in order. chances: [B, NUM_CHANCES], uniform in [0, 1), which decide how.
    """
    side = pyramid[max(pyramid)].shape[-1]
    for name in policy:
        change = POLICIES[name]
        pyramid = {r: change(images, chances.to(images), side) for r, images in pyramid.items()}
    return pyramid


def translation(images, chances, side):
    """Shifts by up to MAX_SHIFT of the side, in whole pixels of the pyramid's highest image, which has this side.

    Lower images move by the same share of their sides, with interpolation.
    """
    share = (2 * chances[:, 0:2] - 1) * MAX_SHIFT
    shift = (share * side).round() / side
    factor = torch.ones_like(shift[:, 0])
    return warp(images, shift, factor)


def scale(images, chances, _):
    """Enlarges or shrinks by up to MAX_SCALE, with equal probability."""
    shift = torch.zeros_like(chances[:, 0:2])
    factor = MAX_SCALE ** (2 * chances[:, 2] - 1)
    return warp(images, shift, factor)


def warp(images, shift, factor):
    """Moves images by shift [B, 2], (x, y) as shares of the side, and enlarges them by factor [B]; grey outside."""
    theta = torch.eye(2, 3, dtype=images.dtype, device=images.device).repeat(len(images), 1, 1)
    theta[:, :, 2] = -2 * shift
    theta = theta / factor[:, None, None]
    with float32_region(images):  # affine_grid is a matrix product; bfloat16 cannot tell neighbouring positions apart
        grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def color(images, chances, _):
    """Adds up to ±½ of brightness, and multiplies saturation by 0 to 2 and contrast by ½ to 1½."""
    brightness, saturation, contrast = chances[:, 3:6, None, None, None].unbind(1)
    images = images + brightness - 0.5
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * 2 * saturation
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def cutout(images, chances, _):
    """Draws a grey square of CUTOUT of the side. Its centre can be anywhere."""
    centres = (torch.arange(images.shape[-1], device=images.device) + 0.5) / images.shape[-1]
    x, y = chances[:, 6, None], chances[:, 7, None]
    inside_x = (centres - x).abs() < CUTOUT / 2  # [B, side]
    inside_y = (centres - y).abs() < CUTOUT / 2
    inside = inside_y[:, :, None] & inside_x[:, None]
    return images * ~inside[:, None]


POLICIES = {"color": color, "translation": translation, "scale": scale, "cutout": cutout}
