"""The building blocks of both networks: equalized layers, resampling, and what stays in float32.

Shapes everywhere: B batch, N = H·W feature points, T text tokens, C channels, E experts, R resolution.
Activations may be bfloat16 under autocast; whatever is squared, normalized or compared stays in float32.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as gradient_checkpoint


def lrelu(x):
    """LeakyReLU(0.2)·√2: the gain keeps the second moment of a unit Gaussian near one (StyleGAN2)."""
    return F.leaky_relu(x, 0.2).mul_(math.sqrt(2))


def rms_norm(x):
    """Divides each vector [..., C] by its root mean square."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8)


def full_precision(x):
    """x in float32 at least: half precision is widened, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def float32_region(x):
    """A context in which autocast is off, for what bfloat16 would ruin: routing, demodulation, distances.

    x names the device only; what is narrow already is widened by full_precision.
    """
    return torch.autocast(x.device.type, enabled=False)


def in_float32(forward):
    """Marks the `forward` of a module that computes in float32 under autocast too, from inputs that are widened.

    Such a module's weights, and those of all modules in it, are never stored in less (sampling/inference.py).
    """

    @functools.wraps(forward)
    def widened(self, *inputs):
        with float32_region(inputs[0]):
            return forward(self, *[full_precision(x) for x in inputs])

    widened.in_float32 = True
    return widened


def recomputed(function, *inputs):
    """function(*inputs) by gradient checkpointing: it runs again in the backward pass, and keeps only its inputs."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return gradient_checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # no randomness here


# ----------------------------------------------------------------------------------------------------------------------
# Equalized learning rate (Progressive GAN, section 4.1): Adam's steps are equally large for all parameters, and should
# change all layers by the same share. The paper draws weights from N(0, 1)/lr_mul and multiplies them by lr_mul/√fan_in
# at every use. Here they are drawn at the scale of their use, s = lr_mul/√fan_in, and learn at s times the rate. The
# scale of a gradient reaches Adam's step through ε alone: with ε/s both forms take the same steps. `lr_scale` names
# what does not learn at the full rate.


def parameter_groups(network, lr, eps=1e-8):
    """The parameters of a network for Adam, each group at lr times its `lr_scale`, and with eps divided by it."""
    groups = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            groups.setdefault(getattr(module, "lr_scale", {}).get(name, 1.0), []).append(parameter)
    return [{"params": parameters, "lr": lr * scale, "eps": eps / scale} for scale, parameters in groups.items()]


class Linear(nn.Module):
    """A dense layer [..., in_features] → [..., out_features] with equalized learning rate."""

    def __init__(self, in_features, out_features, bias=True, bias_init=0.0, lr_mul=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / math.sqrt(in_features))
        self.bias = nn.Parameter(torch.full((out_features,), bias_init)) if bias else None
        self.lr_scale = {"weight": lr_mul / math.sqrt(in_features), "bias": lr_mul}

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Conv2d(nn.Module):
    """A convolution [B, C, H, W] with equalized learning rate; `padding` defaults to the size-keeping one."""

    def __init__(self, in_channels, out_channels, kernel_size, bias=True, padding=None, stride=1):
        super().__init__()
        fan_in = in_channels * kernel_size**2
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size) / math.sqrt(fan_in))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.lr_scale = {"weight": 1 / math.sqrt(fan_in)}
        self.padding = kernel_size // 2 if padding is None else padding
        self.stride = stride

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class ResidualBlock(nn.Module):
    """Two plain convolutions beside the identity, [B, C, H, W] → the same shape."""

    BRANCH_GAIN = 0.4  # of the branch only: a scaled x would shrink at every block

    def __init__(self, channels):
        super().__init__()
        self.conv1 = Conv2d(channels, channels, 3)
        self.conv2 = Conv2d(channels, channels, 3)

    def forward(self, x):
        return x + self.BRANCH_GAIN * lrelu(self.conv2(lrelu(self.conv1(x))))


class Downsample(nn.Module):
    """The stride-2 step: a 4×4 convolution of stride 2, [B, C, H, W] → [B, D, H/2, W/2].

    No low-pass filter before it: in small pictures the highest frequencies tell a drawn edge from a smear.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, 4, padding=1, stride=2)

    def forward(self, x):
        return lrelu(self.conv(x))


# ----------------------------------------------------------------------------------------------------------------------
# Resampling with the binomial filter [1, 3, 3, 1] (StyleGAN2). It is a cascade of three two-tap averages.


def upsample(x):
    """×2. Zeros inserted, then the filter with gain 4: the same as bilinear interpolation between borders of zeros."""
    x = F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2, mode="bilinear", align_corners=False)
    return x[..., 2:-2, 2:-2]


def resize(images, resolution):
    """Averages images [B, 3, R, R] down to a resolution that divides R."""
    return F.interpolate(images, resolution, mode="area")


def pyramid(images, resolutions):
    """Images [B, 3, R, R] → {resolution: image}, averaged down."""
    return {r: resize(images, r) for r in resolutions}
