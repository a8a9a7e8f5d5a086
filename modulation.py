"""Modulated convolutions (StyleGAN2), with adaptive kernels (GigaGAN) and deformable ones (modulated transformations).

A style, computed from w, scales a convolution's input channels. Demodulation divides its output channels by the norm of
the scaled kernel. Scaling the activations equals scaling the kernel, and lets the whole batch share one kernel.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from layers import Linear, float32_region, full_precision, in_float32

# In sampling, a convolution is computed as a matrix product if it has at least this many input channels for each of the
# points that share a kernel. In training, this would keep the unfolded input in memory.
CHANNELS_PER_POINT = 4


def multiply(matrices, columns):
    """Matrices [G, D, K] times columns [B, K, N] → [B, D, N]. G = B: one matrix for each sample; G = 1: one for all."""
    columns = columns.unflatten(0, (len(matrices), -1))  # [G, B/G, K, N]
    return torch.einsum("gdk,gbkn->gbdn", matrices, columns).flatten(0, 1)


class Affine(Linear):
    """A dense layer on a latent code, [B, in_features] → [B, out_features] in float32."""

    @in_float32
    def forward(self, w):
        return super().forward(w)


class ModulatedLinear(nn.Module):
    """A modulated, demodulated 1×1 convolution over feature points: [B, N, C] and w [B, w_dim] → [B, N, D]. It scales
    the activations or each sample's kernel, with the same result.

    The weights are drawn from N(0, 1) without a scale for fan-in, because demodulation divides any scale out.
    """

    def __init__(self, in_features, out_features, w_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.style = Affine(w_dim, in_features, bias_init=1.0)

    def forward(self, x, w):
        style = self.style(w)
        with float32_region(x):
            squared_norm = F.linear(style.square(), full_precision(self.weight).square())
            gain = torch.rsqrt(squared_norm + 1e-8)
        if len(self.weight) < x.shape[1]:  # D < N: scale each sample's kernel, which is smaller than its activations
            kernels = self.weight * style[:, None] * gain[..., None]  # [B, D, C]
            return torch.baddbmm(self.bias, x, kernels.mT)
        h = F.linear(x * style[:, None], self.weight)
        return torch.addcmul(self.bias, h, gain[:, None])


class ModulatedConv2d(nn.Module):
    """A modulated convolution with adaptive kernels (GigaGAN, section 3.1): [B, C, H, W], w [B, w_dim] → [B, D, H, W].

    softmax(dense(w)) mixes n = `num_kernels` kernels into one for each sample. A single kernel is shared by the batch.
    Mixed kernels take memory: in all layers of the release 19.6 GB for a batch of 64 in float32. Training keeps them
    until the backward pass; with gradient checkpointing it keeps those of one level at a time.
    """

    # What kernel_products() returns. sampling/inference.py stores it once, because sampling never changes the weights.
    # In training it is None, which is how convolve() recognizes sampling.
    cached_products = None

    def __init__(self, in_channels, out_channels, kernel_size, w_dim, num_kernels=1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_kernels, out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.style = Affine(w_dim, in_channels, bias_init=1.0)
        self.kernel_mix = Affine(w_dim, num_kernels, bias_init=1.0) if num_kernels > 1 else None

    def forward(self, x, w, *where):
        """where: the offsets and masks of a deformable convolution; otherwise empty."""
        style = self.style(w)
        with float32_region(w):
            mix = self.kernel_mix(w).softmax(-1) if self.kernel_mix else None  # [B, n]
            kernels = self.mixed_kernels(mix)
            gain = self.demodulation(style, kernels, mix)
        h = self.convolve(x * style[..., None, None], kernels, *where)
        return torch.addcmul(self.bias[:, None, None], h, gain)

    def mixed_kernels(self, mix):
        """Σ mₙKₙ for mix [B, n] → [G, D, C, k, k]. G is B, or 1 for a single kernel, which all samples share."""
        if mix is None:
            return self.weight
        mixed = mix.to(self.weight.dtype) @ self.weight.flatten(1)  # [B, D·C·k·k]
        return mixed.unflatten(1, self.weight.shape[1:])

    def demodulation(self, style, kernels, mix):
        """1 / the norm of each output channel's scaled kernel, √Σ_c style_c²·energy_dc: [B, D, 1, 1]."""
        squared_norm = multiply(self.energy(kernels, mix), style.square()[..., None])  # [B, D, 1]
        return torch.rsqrt(squared_norm + 1e-8)[..., None]

    def energy(self, kernels, mix):
        """|Σ mₙKₙ|², summed over the taps: [G, D, C].

        It is computed from the mixed kernels, or as Σ mₙmₗ⟨Kₙ, Kₗ⟩. The latter is faster if there are more samples than
        pairs of kernels, and in sampling, which computes the products ⟨Kₙ, Kₗ⟩ once.
        """
        products = self.cached_products
        if products is None and len(kernels) > len(self.weight) ** 2:  # B > n²
            products = self.kernel_products()
        if products is None:
            norm = torch.linalg.vector_norm(kernels, dim=(-2, -1))
            return norm.square()
        if mix is None:  # n = 1, in sampling
            return products[0]
        pairs = mix[:, :, None] * mix[:, None]  # [B, n, n]
        products = products.flatten(0, 1)  # [n·n, D, C]
        energy = pairs.flatten(1) @ products.flatten(1)
        return energy.unflatten(1, products.shape[1:])

    def kernel_products(self):
        """⟨Kₙ, Kₗ⟩ of every two kernels, summed over the taps: [n, n, D, C]. It does not depend on w."""
        products = self.weight[:, None] * self.weight  # [n, n, D, C, k, k]
        return products.sum((-2, -1))

    def convolve(self, x, kernels):
        """x [B, C, H, W] and kernels [G, D, C, k, k] → [B, D, H, W]: one convolution, with a group for each kernel."""
        batch, groups = len(x), len(kernels)
        height, width = x.shape[2:]
        is_sampling = self.cached_products is not None
        points = batch // groups * height * width  # that share a kernel
        if is_sampling and x.shape[1] >= CHANNELS_PER_POINT * points:
            return unfolded_convolution(x, kernels)
        # Kernels of their own (G = B): [1, B·C, H, W], the samples side by side. One kernel for all (G = 1): x.
        x = x.reshape(batch // groups, -1, height, width)
        padding = kernels.shape[-1] // 2
        h = F.conv2d(x, kernels.flatten(0, 1), padding=padding, groups=groups)
        return h.reshape(batch, -1, height, width)


def unfolded_convolution(x, kernels):
    """Computes ModulatedConv2d.convolve as a matrix product, without the copy of the kernels that a convolution makes
    first. For 1600 channels at 4×4 this is 3.6 times as fast on a CPU.
    """
    padding = kernels.shape[-1] // 2
    columns = F.unfold(x, kernels.shape[-2:], padding=padding)  # [B, C·k·k, H·W]
    y = multiply(kernels.flatten(2), columns)
    return y.unflatten(2, x.shape[2:])


class UpsamplingConv2d(ModulatedConv2d):
    """A modulated convolution that doubles the resolution (StyleGAN2): a transposed convolution of stride 2, then the
    filter [1, 3, 3, 1]/4 along both axes.
    """

    def convolve(self, x, kernels):
        y = folded_transposed_convolution(x, kernels)  # [B, D, 2H + 1, 2W + 1]
        # [1, 3, 3, 1]/4, computed on the device: a copy from the host would make it wait.
        from_centre = torch.arange(4, dtype=y.dtype, device=y.device) - 1.5
        taps = 1 - from_centre.abs() / 2
        filters = torch.outer(taps, taps).expand(y.shape[1], 1, 4, 4)
        return F.conv2d(y, filters, padding=1, groups=y.shape[1])


def folded_transposed_convolution(x, kernels):
    """F.conv_transpose2d with stride 2: x [B, C, H, W] and kernels [G, D, C, k, k] → [B, D, 2H + 1, 2W + 1].

    It is computed as a matrix product and the sum of its overlapping results: on a CPU in 0.7 of the time for 24
    channels at 64×64, and in the same time for 256 channels at 8×8.
    """
    height, width = x.shape[2:]
    kernels = kernels.movedim(2, -1)  # [G, D, k, k, C]
    taps = multiply(kernels.flatten(1, 3), x.flatten(2))  # [B, D·k·k, H·W]
    size = 2 * height + 1, 2 * width + 1
    return F.fold(taps, size, kernels.shape[2:4], stride=2)


class ToRGB(ModulatedConv2d):
    """A modulated 1×1 convolution to three channels, scaled by 1/√C instead of demodulated. It starts at zero: so a new
    resolution begins with the upsampled image of the one below, and needs no fade-in.
    """

    def __init__(self, in_channels, w_dim, num_kernels):
        super().__init__(in_channels, 3, 1, w_dim, num_kernels)
        nn.init.zeros_(self.weight)

    @in_float32
    def forward(self, x, w):
        return super().forward(x, w)

    def demodulation(self, style, kernels, mix):
        gain = 1 / math.sqrt(style.shape[1])
        return torch.full_like(style[:, :1, None, None], gain)


class TransformationField(ModulatedConv2d):
    """The modulated transformation (MTM): a demodulated convolution with learned scales, which start at zero.

    [B, C, H, W] → offsets [B, 18, H, W], the (dy, dx) pairs that torchvision takes, and masks [B, 9, H, W] in (0, 2).
    At the start offsets are 0 and masks 1, which makes an ordinary convolution.
    """

    def __init__(self, in_channels, w_dim):
        super().__init__(in_channels, 27, 3, w_dim)
        self.scales = nn.Parameter(torch.zeros(27))

    def demodulation(self, style, kernels, mix):
        gain = super().demodulation(style, kernels, mix)
        return gain * self.scales[:, None, None]

    def forward(self, x, w):
        offsets, mask = super().forward(x, w).split([18, 9], dim=1)
        return offsets, 2 * mask.sigmoid()


class DeformableConv2d(ModulatedConv2d):
    """A modulated 3×3 convolution that reads its input at positions that a transformation field predicts from x and w.

    It is a deformable convolution with masks (Zhu et al. 2019) and padding 1. torchvision.ops.deform_conv2d computes
    the same, but on one CPU thread only; here it is grid_sample, for bilinear samples, and one matrix product.
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
            grid_y = at_y * 2 / (height - 1) - 1  # −1 and 1 are the outer pixels
            grid_x = at_x * 2 / (width - 1) - 1
            grid = torch.stack([grid_x, grid_y], dim=-1).flatten(1, 2)  # [B, 9·H, W, 2]
            samples = F.grid_sample(full_precision(x), grid, align_corners=True)  # [B, C, 9·H, W]
            samples = samples.unflatten(2, (9, height))
        columns = (samples * mask[:, None]).flatten(1, 2)  # [B, C·9, H, W]
        y = multiply(kernels.flatten(2), columns.flatten(2))
        return y.unflatten(2, (height, width))
