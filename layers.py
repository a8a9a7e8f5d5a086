"""The building blocks of both networks: equalized layers, resampling, and float32 regions under autocast.

Shapes everywhere: B batch, N = H·W feature points, T text tokens, C channels, E experts, R resolution.
Activations may be bfloat16 under autocast; whatever is squared, normalized or compared is computed in float32. The
generator's convolutions return float32.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as gradient_checkpoint


def lrelu(x):
    """LeakyReLU(0.2)·√2. The gain keeps the second moment of a unit Gaussian near one (StyleGAN2)."""
    return F.leaky_relu(x, 0.2).mul_(math.sqrt(2))


def rms_norm(x):
    """Divides each vector [..., C] by its root mean square."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8)


def full_precision(x):
    """x in float32, or in float64 if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def float32_region(x):
    """A context without autocast, for computations that bfloat16 would ruin: routing, demodulation, distances.

    x only names the device. Tensors that are bfloat16 already are widened by full_precision.
    """
    return torch.autocast(x.device.type, enabled=False)


def in_float32(forward):
    """Decorates the `forward` of a module that computes in float32 even under autocast. Its inputs are widened.

    Sampling never stores the weights of such a module, or of modules in it, in bfloat16 (sampling/inference.py).
    """

    @functools.wraps(forward)
    def widened(self, *inputs):
        with float32_region(inputs[0]):
            return forward(self, *[full_precision(x) for x in inputs])

    widened.in_float32 = True
    return widened


def recomputed(function, *inputs):
    """function(*inputs) with gradient checkpointing: it keeps only its inputs, and runs again in the backward pass."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return gradient_checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # no randomness here


# ----------------------------------------------------------------------------------------------------------------------
# Equalized learning rate (Progressive GAN, section 4.1): Adam's steps are equally large for all parameters, and should
# change all layers by the same share. StyleGAN draws weights v from N(0, 1)/lr_mul and uses w = s·v with s =
# lr_mul/√fan_in. We draw w itself, from N(0, 1)/√fan_in, and give Adam the learning rate s·lr and ε/s. Both forms take
# the same steps: if g is the gradient of w, Adam moves v by lr·(s·g)/(|s·g| + ε), and so w by s·lr·g/(|g| + ε/s).
# A module's `lr_scale` gives s for each parameter for which it is not one.


def parameter_groups(network, lr, eps=1e-8):
    """A network's parameters for Adam, grouped by `lr_scale`: lr is multiplied by it, eps divided by it."""
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
    """A convolution [B, C, H, W] with equalized learning rate. By default `padding` keeps the size."""

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
    """Two plain convolutions and the identity, added: [B, C, H, W] → the same shape."""

    BRANCH_GAIN = 0.4  # for the branch only: a scaled x would shrink at every block, as in the generator

    def __init__(self, channels):
        super().__init__()
        self.conv1 = Conv2d(channels, channels, 3)
        self.conv2 = Conv2d(channels, channels, 3)

    def forward(self, x):
        return x + self.BRANCH_GAIN * lrelu(self.conv2(lrelu(self.conv1(x))))


class Downsample(nn.Module):
    """A 4×4 convolution of stride 2, [B, C, H, W] → [B, D, H/2, W/2].

    There is no low-pass filter before it: in small pictures the highest frequencies distinguish an edge from a smear.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, 4, padding=1, stride=2)

    def forward(self, x):
        return lrelu(self.conv(x))


# ----------------------------------------------------------------------------------------------------------------------
# Resampling.


def upsample(x):
    """×2, bilinear, with zeros outside the image: the same as StyleGAN2's, which inserts zeros and then filters."""
    x = F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2, mode="bilinear", align_corners=False)
    return x[..., 2:-2, 2:-2]


def resize(images, resolution):
    """Averages images [B, 3, R, R] down to a resolution that divides R."""
    return F.interpolate(images, resolution, mode="area")


def pyramid(images, resolutions):
    """Images [B, 3, R, R] → {resolution: image}, averaged down."""
    return {r: resize(images, r) for r in resolutions}
