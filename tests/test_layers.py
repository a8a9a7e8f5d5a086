"""The building blocks against torchvision, PyTorch's own functions, or the formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import deform_conv2d

import layers
from aurora import Generator
from presets import PRESETS
from sampling.inference import freeze
from tests.conftest import assert_same_gradients

torch.manual_seed(0)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("per_sample", [False, True])
def test_deformable_convolution_is_torchvisions(per_sample):
    """Values and all gradients, for offsets that also point outside the image."""
    x, offsets, mask = double(2, 5, 6, 7), 2 * double(2, 18, 6, 7), double(2, 9, 6, 7)
    kernels = double(2 if per_sample else 1, 4, 5, 3, 3)
    inputs = [t.requires_grad_() for t in (x, kernels, offsets, mask)]
    ours = layers.DeformableConv2d(5, 4, w_dim=3).convolve(*inputs)
    theirs = torch.cat(
        [
            deform_conv2d(x[i : i + 1], offsets[i : i + 1], kernels[i % len(kernels)], padding=1, mask=mask[i : i + 1])
            for i in range(2)
        ]
    )
    torch.testing.assert_close(ours, theirs)
    assert_same_gradients(ours, theirs, inputs)


def naive_modulated_convolution(layer, x, w, convolve):
    """StyleGAN2's equations 1 and 3 with GigaGAN's kernel selection, sample by sample, each with its own kernel."""
    outputs = []
    for sample, code in zip(x, w, strict=True):
        kernel = layer.weight[0]
        if layer.kernel_mix is not None:
            share = layer.kernel_mix(code[None]).softmax(-1)[0]
            kernel = sum(a * k for a, k in zip(share, layer.weight, strict=True))
        kernel = kernel * layer.style(code[None])[0][None, :, None, None]
        kernel = kernel / (kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        outputs.append(convolve(sample[None], kernel)[0] + layer.bias[:, None, None])
    return torch.stack(outputs)


@pytest.mark.parametrize(("channels", "side"), [(5, 8), (50, 2)], ids=["many points", "many channels"])
@pytest.mark.parametrize("num_kernels", [1, 3])
def test_modulated_convolution_scales_activations_as_if_kernels(num_kernels, channels, side):
    """Values and gradients; then frozen, as a convolution and as a matrix product."""
    layer = layers.ModulatedConv2d(channels, 6, 3, w_dim=7, num_kernels=num_kernels).double()
    layer.bias.data.normal_()
    x, w = double(3, channels, side, side), double(3, 7)
    inputs = [x.requires_grad_(), w.requires_grad_(), *layer.parameters()]
    naive, ours = naive_modulated_convolution(layer, x, w, lambda x, k: F.conv2d(x, k, padding=1)), layer(x, w)
    torch.testing.assert_close(ours, naive)
    assert_same_gradients(ours, naive, inputs)
    freeze(layer)
    torch.testing.assert_close(layer(x, w), naive)


def test_upsampling_convolution_is_transposed_convolution_then_filter():
    layer = layers.UpsamplingConv2d(4, 5, 3, w_dim=6, num_kernels=2).double()
    x, w = double(2, 4, 8, 8), double(2, 6)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]).double() / 8
    kernel = (torch.outer(taps, taps) * 4).expand(5, 1, 4, 4)

    def convolve(x, k):
        wide = F.conv_transpose2d(x, k.transpose(0, 1), stride=2)
        assert wide.shape[-1] == 17
        return F.conv2d(wide, kernel, padding=1, groups=5)

    naive = naive_modulated_convolution(layer, x, w, convolve)
    torch.testing.assert_close(layer(x, w), naive)
    freeze(layer)
    torch.testing.assert_close(layer(x, w), naive)


def test_upsample_inserts_zeros_and_filters():
    x = torch.randn(2, 3, 5, 5)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    zeros = torch.zeros(2, 3, 10, 10)
    zeros[..., ::2, ::2] = x
    padded = F.pad(zeros, (2, 1, 2, 1))
    expected = F.conv2d(padded, (torch.outer(taps, taps) * 4).expand(3, 1, 4, 4), groups=3)
    torch.testing.assert_close(layers.upsample(x), expected)


def test_modulated_linear_is_a_modulated_1x1_convolution():
    linear, conv = layers.ModulatedLinear(5, 6, w_dim=7), layers.ModulatedConv2d(5, 6, 1, w_dim=7)
    conv.load_state_dict({**linear.state_dict(), "weight": linear.weight[None, :, :, None, None]})
    x, w = torch.randn(2, 9, 5), torch.randn(2, 7)
    expected = conv(x.transpose(1, 2)[..., None], w)[..., 0].transpose(1, 2)
    torch.testing.assert_close(linear(x, w), expected)


@pytest.mark.parametrize("lr_mul", [1.0, 0.01])
def test_equalized_layers_start_with_unit_gain(lr_mul):
    x = torch.randn(4096, 256)
    assert layers.Linear(256, 64, lr_mul=lr_mul)(x).std().item() == pytest.approx(1, abs=0.05)
    assert layers.lrelu(x).square().mean().item() == pytest.approx(1.04, abs=0.05)
    torch.testing.assert_close(layers.Linear(3, 2, bias_init=1.0, lr_mul=lr_mul)(torch.zeros(1, 3)), torch.ones(1, 2))


@pytest.mark.parametrize("lr_mul", [1.0, 0.01])
def test_equalized_learning_rate_is_progressive_gans(lr_mul):
    """Ten steps of Adam, beside a layer that multiplies its weight by lr_mul/√fan_in and its bias by lr_mul."""
    layer, x, target = layers.Linear(7, 5, bias_init=1.0, lr_mul=lr_mul).double(), double(20, 7), double(20, 5)
    gain = lr_mul / math.sqrt(7)
    weight, bias = (layer.weight / gain).detach().requires_grad_(), (layer.bias / lr_mul).detach().requires_grad_()
    # Adam's eps would tell small gradients from large ones; without it no scale remains.
    ours = torch.optim.Adam(layers.parameter_groups(layer, 0.03), betas=(0.0, 0.99), eps=0.0)
    theirs = torch.optim.Adam([weight, bias], 0.03, betas=(0.0, 0.99), eps=0.0)
    for _ in range(10):
        for optimizer, output in ((ours, layer(x)), (theirs, F.linear(x, weight * gain, bias * lr_mul))):
            optimizer.zero_grad()
            (output - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer.weight, weight * gain)
    torch.testing.assert_close(layer.bias, bias * lr_mul)


def test_every_parameter_is_in_one_group():
    generator = Generator(PRESETS["shapes"].generator)
    groups = layers.parameter_groups(generator, 2.0)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in generator.parameters())
    (experts,) = (group for group in groups if any(p.ndim == 3 and p.shape[1] == 64 for p in group["params"]))
    assert experts["lr"] == 2.0 / math.sqrt(256)


def test_pyramid_averages():
    image = torch.arange(64.0).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    small = layers.pyramid(image, [4, 8])
    assert torch.equal(small[8], image)
    assert small[4][0, 0, 0, 0] == (0 + 1 + 8 + 9) / 4
