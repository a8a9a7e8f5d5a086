"""Modulated convolutions (StyleGAN2), with adaptive kernels (GigaGAN) and deformable ones (modulated transformations).

A style, computed from w, scales a convolution's input channels. Demodulation divides its output channels by the norm of
the scaled kernel. To scale activations is the same as to scale the kernel, and the whole batch can then share one.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from layers import Float32, Linear, float32_region, full_precision


class Affine(Float32, Linear):
    """A dense layer on a latent code, [B, in_features] → [B, out_features] in float32."""


class ModulatedLinear(nn.Module):
    """A modulated, demodulated 1×1 convolution over feature points: [B, N, C] and w [B, w_dim] → [B, N, D]."""

    def __init__(self, in_features, out_features, w_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.style = Affine(w_dim, in_features, bias_init=1.0)

    def forward(self, x, w):
        style = self.style(w)
        with float32_region(x):
            gain = torch.rsqrt(F.linear(style.square(), full_precision(self.weight).square()) + 1e-8)
        if len(self.weight) < x.shape[1]:  # D < N: scale a sample's kernel, which is smaller than its activations
            kernels = self.weight * style[:, None] * gain[..., None]  # [B, D, C]
            return torch.baddbmm(self.bias, x, kernels.mT)
        return torch.addcmul(self.bias, F.linear(x * style[:, None], self.weight), gain[:, None])


class ModulatedConv2d(nn.Module):
    """A modulated convolution with adaptive kernels (GigaGAN, section 3.1): [B, C, H, W], w [B, w_dim] → [B, D, H, W].

    n = `num_kernels` kernels are mixed by softmax(dense(w)) into one a sample. A single kernel is shared by the batch.
    Mixed ones take memory: at 16×16, one layer of the release makes 2.4 GB of them for a batch of 64. Training keeps
    them until the backward pass. With gradient checkpointing that is one level's at a time.
    """

    def __init__(self, in_channels, out_channels, kernel_size, w_dim, num_kernels=1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_kernels, out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.style = Affine(w_dim, in_channels, bias_init=1.0)
        self.kernel_mix = Affine(w_dim, num_kernels, bias_init=1.0) if num_kernels > 1 else None

    def mixed_kernels(self, mix):
        """mix [B, n] → the kernels [G, D, C, k, k]: G = B, or 1 for a single one that all share."""
        if self.kernel_mix is None:
            return self.weight
        return (mix.to(self.weight.dtype) @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:])

    def energy(self, kernels, mix):
        """The squares of the kernels, summed over their taps: [G, D, C].

        Of more samples than pairs of kernels, it is faster to take the products of the pairs.
        """
        if len(kernels) <= len(self.weight) ** 2:
            return torch.linalg.vector_norm(kernels, dim=(-2, -1)).square()
        return mixed_energy(self.kernel_products(), mix)

    def kernel_products(self):
        """⟨Kₙ, Kₗ⟩ of every two kernels, over their taps: [n, n, D, C]. They do not depend on w."""
        return (self.weight[:, None] * self.weight).sum((-2, -1))

    def demodulation(self, style, kernels, mix):
        """[B, D, 1, 1]: one over the norm of each output channel's scaled kernel."""
        return torch.rsqrt(multiply(self.energy(kernels, mix), style.square()[..., None]) + 1e-8)[..., None]

    def convolve(self, x, kernels):
        """x [B, C, H, W] and kernels [G, D, C, k, k] → [B, D, H, W], a group of the convolution for each kernel."""
        batch, groups, (height, width) = len(x), len(kernels), x.shape[2:]
        x = x.reshape(batch // groups, -1, height, width)
        h = F.conv2d(x, kernels.flatten(0, 1), padding=kernels.shape[-1] // 2, groups=groups)
        return h.reshape(batch, -1, height, width)

    def forward(self, x, w, *where):
        """where: what else `convolve` takes."""
        style = self.style(w)
        with float32_region(w):
            mix = self.kernel_mix(w).softmax(-1) if self.kernel_mix else None  # [B, n]
            kernels = self.mixed_kernels(mix)
            gain = self.demodulation(style, kernels, mix)
        return torch.addcmul(self.bias[:, None, None], self.convolve(x * style[..., None, None], kernels, *where), gain)


def mixed_energy(products, mix):
    """|Σ mₙKₙ|² = Σ mₙmₗ⟨Kₙ, Kₗ⟩ of kernel_products [n, n, D, C] and mix [B, n] → [B, D, C]."""
    pairs = (mix[:, :, None] * mix[:, None]).flatten(1)  # [B, n·n]
    return (pairs @ products.flatten(0, 1).flatten(1)).unflatten(1, products.shape[2:])


def multiply(matrices, columns):
    """Matrices [G, D, K] times columns [B, K, N] → [B, D, N]. G = B: each sample has its own; G = 1: all share one."""
    groups = len(matrices)
    columns = columns.unflatten(0, (groups, -1)).transpose(1, 2)  # [G, K, B/G, N]
    return (matrices @ columns.flatten(2)).unflatten(2, columns.shape[2:]).transpose(1, 2).flatten(0, 1)


class UpsamplingConv2d(ModulatedConv2d):
    """A modulated convolution that doubles the resolution: a transposed convolution of stride 2, then the filter.

    The former is one matrix product, and the sum of its overlapping results.
    """

    def convolve(self, x, kernels):
        height, width = x.shape[2:]
        kernels = kernels.movedim(2, -1)  # [G, D, k, k, C]
        taps = multiply(kernels.flatten(1, 3), x.flatten(2))  # [B, D·k·k, H·W]
        y = F.fold(taps, (2 * height + 1, 2 * width + 1), kernels.shape[2:4], stride=2)
        binomial = 1 - (torch.arange(4, dtype=y.dtype, device=y.device) - 1.5).abs() / 2  # [1, 3, 3, 1]/4: gain 2
        return F.conv2d(y, torch.outer(binomial, binomial).expand(y.shape[1], 1, 4, 4), padding=1, groups=y.shape[1])


class ToRGB(Float32, ModulatedConv2d):
    """A modulated 1×1 convolution to three channels, scaled by 1/√C in the place of demodulation. It starts at zero: a
    new resolution begins with the upsampled image of the one below, and needs no fade-in.
    """

    def __init__(self, in_channels, w_dim, num_kernels):
        super().__init__(in_channels, 3, 1, w_dim, num_kernels)
        nn.init.zeros_(self.weight)

    def demodulation(self, style, kernels, mix):
        return torch.full_like(style[:, :1, None, None], 1 / math.sqrt(style.shape[1]))


class TransformationField(ModulatedConv2d):
    """The modulated transformation (MTM): a demodulated convolution with learned scales, which start at zero.

    [B, C, H, W] → offsets [B, 18, H, W], the (dy, dx) pairs that torchvision takes, and masks [B, 9, H, W] in (0, 2).
    """

    def __init__(self, in_channels, w_dim):
        super().__init__(in_channels, 27, 3, w_dim)
        self.scales = nn.Parameter(torch.zeros(27))

    def demodulation(self, style, kernels, mix):
        return super().demodulation(style, kernels, mix) * self.scales[:, None, None]

    def forward(self, x, w):
        offsets, mask = super().forward(x, w).split([18, 9], dim=1)
        return offsets, 2 * mask.sigmoid()


class DeformableConv2d(ModulatedConv2d):
    """A modulated 3×3 convolution that reads its input where a transformation field of x and w tells it to.

    Modulated deformable convolution (Zhu et al. 2019) with padding 1: what torchvision.ops.deform_conv2d computes, here
    as bilinear samples by grid_sample and one matrix product, since torchvision's runs on one CPU thread only.
    """

    def __init__(self, in_channels, out_channels, w_dim, num_kernels=1):
        super().__init__(in_channels, out_channels, 3, w_dim, num_kernels)
        self.field = TransformationField(in_channels, w_dim)

    def forward(self, x, w):
        return super().forward(x, w, *self.field(x, w))

    def convolve(self, x, kernels, offsets, mask):
        """offsets [B, 18, H, W] as (dy, dx) pairs in pixels, mask [B, 9, H, W]."""
        height, width = x.shape[2:]
        with float32_region(x):  # bfloat16 cannot tell neighbouring positions apart
            tap = torch.arange(9, device=x.device)[:, None, None]  # of the kernel, row by row
            dy, dx = full_precision(offsets).unflatten(1, (9, 2)).unbind(2)  # [B, 9, H, W]
            at_y = dy + (tap // 3 - 1) + torch.arange(height, device=x.device)[:, None]
            at_x = dx + (tap % 3 - 1) + torch.arange(width, device=x.device)
            grid = torch.stack([at_x * 2 / (width - 1) - 1, at_y * 2 / (height - 1) - 1], dim=-1)  # ±1: outer pixels
            samples = F.grid_sample(full_precision(x), grid.flatten(1, 2), align_corners=True).unflatten(2, (9, height))
        columns = (samples * mask[:, None]).flatten(1, 2).flatten(2)  # [B, 9C, H·W]
        return multiply(kernels.flatten(2), columns).unflatten(2, (height, width))
