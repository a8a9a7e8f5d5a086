"""The building blocks of both networks: equalized layers, modulated convolutions, resampling.

Shapes everywhere: B batch, N = H·W feature points, T text tokens, C channels, E experts, R resolution.
Activations may be bfloat16 under autocast; whatever is squared, normalized or compared stays in float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def lrelu(x):
    """LeakyReLU(0.2)·√2: the gain keeps the second moment of a unit Gaussian near one (StyleGAN2)."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def rms_norm(x, eps=1e-8):
    """Divides each vector [..., C] by its root mean square."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def full_precision(x):
    """x in float32 at least: half precision is widened, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def float32_region(x):
    """A context in which autocast is off, for what bfloat16 would ruin: routing, demodulation, distances."""
    return torch.autocast(x.device.type, enabled=False)


# ----------------------------------------------------------------------------------------------------------------------
# Equalized learning rate (Progressive GAN, section 4.1): Adam's steps have the same size for every parameter and should
# mean the same relative change in all layers. The paper draws weights from N(0, 1)/lr_mul and multiplies them by
# lr_mul/√fan_in whenever they are used. Here they are drawn at the scale of their use, N(0, 1/fan_in), and learn at
# lr_mul/√fan_in times the learning rate: Adam does not see the scale of a gradient, so the two are the same, and this
# one costs nothing. A module says in `lr_scale` which of its parameters do not learn at the full rate.


def parameter_groups(network, lr):
    """The parameters of a network for an optimizer, each group at lr times its `lr_scale`."""
    groups = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            groups.setdefault(getattr(module, "lr_scale", {}).get(name, 1.0), []).append(parameter)
    return [{"params": parameters, "lr": lr * scale} for scale, parameters in groups.items()]


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


# ----------------------------------------------------------------------------------------------------------------------
# Resampling with the binomial filter [1, 3, 3, 1] (StyleGAN2). It is a cascade of three two-tap averages.


def upsample(x):
    """×2: zeros inserted, then the filter with gain 4 and padding (2, 1), which is bilinear between zero borders."""
    x = F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2, mode="bilinear", align_corners=False)
    return x[..., 2:-2, 2:-2]


def blur(x):
    """The filter alone, padding 1: [B, C, H, W] → [B, C, H−1, W−1]."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8
    channels = x.shape[1]
    return F.conv2d(x, torch.outer(taps, taps).expand(channels, 1, 4, 4), padding=1, groups=channels)


# ----------------------------------------------------------------------------------------------------------------------
# Modulation: a convolution whose input channels are scaled by a style computed from w, and whose output channels are
# divided by the norm of the kernel so scaled ("demodulation", StyleGAN2). Scaling activations is the same as scaling
# kernels, and needs no copy of them per sample where there is one for all.


class ModulatedLinear(nn.Module):
    """A modulated, demodulated 1×1 convolution over feature points: [B, N, C] and w [B, w_dim] → [B, N, D]."""

    def __init__(self, in_features, out_features, w_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.style = Linear(w_dim, in_features, bias_init=1.0)

    def forward(self, x, w):
        with float32_region(x):
            style = self.style(full_precision(w))
            demodulation = torch.rsqrt(F.linear(style.square(), self.weight.square()) + 1e-8)
        return F.linear(x * style[:, None], self.weight) * demodulation[:, None] + self.bias


class ModulatedConv2d(nn.Module):
    """A modulated convolution with adaptive kernels (GigaGAN, section 3.1): [B, C, H, W], w [B, w_dim] → [B, D, H, W].

    `num_kernels` kernels are mixed by softmax(dense(w)) into one a sample; a single kernel is shared by the batch.
    """

    def __init__(self, in_channels, out_channels, kernel_size, w_dim, num_kernels=1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_kernels, out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.style = Linear(w_dim, in_channels, bias_init=1.0)
        self.kernel_mix = Linear(w_dim, num_kernels, bias_init=1.0) if num_kernels > 1 else None

    def mix(self, w):
        """The share of every kernel [G, n]: G = B, or 1 where there is nothing to mix."""
        return w.new_ones(1, 1) if self.kernel_mix is None else self.kernel_mix(w).softmax(-1)

    def kernels(self, mix):
        """The mixed kernels [G, D, C, k, k]."""
        if self.kernel_mix is None:
            return self.weight
        return (mix @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:])

    def output_gain(self, style, mix):
        """Demodulation [B, D]: one over the norm of each output channel's scaled kernel.

        |Σ mₙKₙ|² is Σ mₙmₗ⟨Kₙ, Kₗ⟩, and the products of the kernels are the same for every sample.
        """
        products = torch.einsum("ndcij,ldcij->nldc", self.weight, self.weight).flatten(2)
        pairs = (mix[:, :, None] * mix[:, None]).flatten(1)  # [G, n·n]
        energy = (pairs @ products.flatten(0, 1)).unflatten(1, self.weight.shape[1:3])  # [G, D, C]
        return torch.rsqrt((energy @ style.square()[..., None])[..., 0] + 1e-8)

    def modulation(self, w):
        """What depends on w alone, in float32: style [B, C, 1, 1], kernels [G, D, C, k, k], gain [B, D, 1, 1]."""
        with float32_region(w):
            w = full_precision(w)
            style, mix = self.style(w), self.mix(w)
            kernels, gain = self.kernels(mix), self.output_gain(style, mix)
        return style[..., None, None], kernels, gain[..., None, None]

    def convolve(self, x, kernels):
        return grouped(F.conv2d, x, kernels, padding=kernels.shape[-1] // 2, groups=len(kernels))

    def forward(self, x, w):
        style, kernels, gain = self.modulation(w)
        return self.convolve(x * style, kernels) * gain + self.bias[:, None, None]


def grouped(convolution, x, kernels, **kwargs):
    """Applies kernels [G, D, C, k, k] to x [B, C, H, W], G = 1 or B, as one call: B samples as G groups of channels."""
    batch, (groups, _, *kernel_shape) = len(x), kernels.shape
    y = convolution(x.reshape(batch // groups, -1, *x.shape[2:]), kernels.reshape(-1, *kernel_shape), **kwargs)
    return y.reshape(batch, -1, *y.shape[2:])


class UpsamplingConv2d(ModulatedConv2d):
    """A modulated convolution that doubles the resolution: transposed convolution of stride 2, then the filter."""

    def convolve(self, x, kernels):
        y = grouped(F.conv_transpose2d, x, kernels.transpose(1, 2), stride=2, groups=len(kernels))  # 2H + 1 wide
        return blur(y) * 4


class ToRGB(ModulatedConv2d):
    """A modulated 1×1 convolution to three channels, without demodulation.

    It starts at zero, so that a resolution begins with the image of the one below, upsampled; no fade-in is needed.
    """

    def __init__(self, in_channels, w_dim, num_kernels):
        super().__init__(in_channels, 3, 1, w_dim, num_kernels)
        nn.init.zeros_(self.weight)

    def output_gain(self, style, mix):
        return torch.full_like(style[:, :1], 1 / math.sqrt(style.shape[1]))


class TransformationField(ModulatedConv2d):
    """The modulated transformation (MTM): a demodulated convolution with learned scales, which start at zero.

    [B, C, H, W] → offsets [B, 18, H, W], the (dy, dx) pairs that torchvision takes, and masks [B, 9, H, W] in (0, 2).
    """

    def __init__(self, in_channels, w_dim):
        super().__init__(in_channels, 27, 3, w_dim)
        self.scales = nn.Parameter(torch.zeros(27))

    def forward(self, x, w):
        style, kernels, gain = self.modulation(w)
        field = self.convolve(x * style, kernels) * gain * self.scales[:, None, None] + self.bias[:, None, None]
        offsets, mask = field.split([18, 9], dim=1)
        return offsets, 2 * mask.sigmoid()


class DeformableConv2d(ModulatedConv2d):
    """A modulated 3×3 convolution that reads its input where a transformation field of x and w tells it to."""

    def __init__(self, in_channels, out_channels, w_dim, num_kernels=1):
        super().__init__(in_channels, out_channels, 3, w_dim, num_kernels)
        self.field = TransformationField(in_channels, w_dim)

    def forward(self, x, w):
        style, kernels, gain = self.modulation(w)
        offsets, mask = self.field(x, w)
        return deformable_conv2d(x * style, kernels, offsets, mask) * gain + self.bias[:, None, None]


def deformable_conv2d(x, kernels, offsets, mask):
    """Modulated deformable convolution (Zhu et al. 2019), 3×3, padding 1: what torchvision.ops.deform_conv2d computes.

    x [B, C, H, W], kernels [G, D, C, 3, 3] with G = 1 or B, offsets [B, 18, H, W] as (dy, dx) pairs in pixels, mask
    [B, 9, H, W]. Bilinear samples by grid_sample, then one matrix product; torchvision's runs on one CPU thread only.
    """
    height, width = x.shape[2:]
    with float32_region(x):  # bfloat16 cannot tell neighbouring positions apart
        tap_y, tap_x = (t.flatten() - 1 for t in torch.meshgrid(*[torch.arange(3, device=x.device)] * 2, indexing="ij"))
        dy, dx = full_precision(offsets).unflatten(1, (9, 2)).unbind(2)  # [B, 9, H, W]
        y_position = dy + tap_y[:, None, None] + torch.arange(height, device=x.device)[:, None]
        x_position = dx + tap_x[:, None, None] + torch.arange(width, device=x.device)
        grid = torch.stack(
            [x_position * 2 / (width - 1) - 1, y_position * 2 / (height - 1) - 1], dim=-1
        )  # ±1 at the outer pixels
        samples = F.grid_sample(full_precision(x), grid.flatten(1, 2), align_corners=True).unflatten(2, (9, height))
    columns = (samples * mask[:, None]).flatten(1, 2).flatten(2)  # [B, 9C, H·W]
    return (kernels.flatten(2) @ columns).unflatten(2, (height, width))
