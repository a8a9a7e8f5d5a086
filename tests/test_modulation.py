"""Modulated convolutions against torchvision, PyTorch's own functions, or the formula."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import deform_conv2d

import modulation
from tests.conftest import assert_same_gradients, double
from tests.figures import moved


@pytest.mark.parametrize("per_sample", [False, True])
def test_deformable_convolution_is_torchvisions(per_sample):
    """Values and all gradients, for offsets that also point outside the image."""
    x, offsets, mask = double(2, 5, 6, 7), 2 * double(2, 18, 6, 7), double(2, 9, 6, 7)
    kernels = double(2 if per_sample else 1, 4, 5, 3, 3)
    inputs = [t.requires_grad_() for t in (x, kernels, offsets, mask)]
    ours = modulation.DeformableConv2d(5, 4, w_dim=3).convolve(*inputs)
    own = kernels.expand(2, -1, -1, -1, -1)
    theirs = [deform_conv2d(x[[i]], offsets[[i]], own[i], padding=1, mask=mask[[i]]) for i in range(2)]
    theirs = torch.cat(theirs)
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
        if isinstance(layer, modulation.ToRGB):
            kernel = kernel / len(sample) ** 0.5
        else:
            kernel = kernel / (kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        outputs.append(convolve(sample[None], kernel)[0] + layer.bias[:, None, None])
    return torch.stack(outputs)


def ordinary(x, kernel):
    return F.conv2d(x, kernel, padding=1)


def upsampling(x, kernel):
    """A transposed convolution, then a filter."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]).double() / 8
    wide = F.conv_transpose2d(x, kernel.transpose(0, 1), stride=2)
    assert wide.shape[-1] == 2 * x.shape[-1] + 1
    return F.conv2d(wide, (torch.outer(taps, taps) * 4).expand(6, 1, 4, 4), padding=1, groups=6)


@pytest.mark.parametrize(
    ("kind", "convolve", "channels", "side"),
    [
        pytest.param(modulation.ModulatedConv2d, ordinary, 5, 8, id="many points"),
        pytest.param(modulation.ModulatedConv2d, ordinary, 50, 2, id="many channels"),
        pytest.param(modulation.UpsamplingConv2d, upsampling, 4, 8, id="upsampling"),
    ],
)
@pytest.mark.parametrize("num_kernels", [1, 2, 3])
def test_modulated_convolution_scales_activations_as_if_kernels(num_kernels, kind, convolve, channels, side):
    """Values and gradients; then frozen, as a convolution and as a matrix product."""
    layer = kind(channels, 6, 3, w_dim=7, num_kernels=num_kernels).double()
    layer.bias.data.normal_()
    x, w = double(3, channels, side, side), double(3, 7)
    inputs = [x.requires_grad_(), w.requires_grad_(), *layer.parameters()]
    naive, ours = naive_modulated_convolution(layer, x, w, convolve), layer(x, w)
    torch.testing.assert_close(ours, naive)
    assert_same_gradients(ours, naive, inputs)
    layer.cached_products = layer.kernel_products().detach()
    torch.testing.assert_close(layer(x, w), naive)


@pytest.mark.parametrize("points", [9, 3], ids=["a kernel for each sample", "one kernel"])
def test_modulated_linear_is_a_modulated_1x1_convolution(points):
    linear = modulation.ModulatedLinear(5, 6, w_dim=7).double()
    conv = modulation.ModulatedConv2d(5, 6, 1, w_dim=7).double()
    conv.load_state_dict({**linear.state_dict(), "weight": linear.weight[None, :, :, None, None]})
    inputs = x, w = double(2, points, 5).requires_grad_(), double(2, 7).requires_grad_()
    ours, expected = linear(x, w), conv(x.transpose(1, 2)[..., None], w)[..., 0].transpose(1, 2)
    torch.testing.assert_close(ours, expected)
    assert_same_gradients(ours, expected, inputs)


def test_to_rgb_is_scaled_by_its_channels_instead_of_demodulated():
    layer, x, w = moved(modulation.ToRGB(8, w_dim=4, num_kernels=3).double()), double(20, 8, 2, 2), double(20, 4)
    torch.testing.assert_close(layer(x, w), naive_modulated_convolution(layer, x, w, F.conv2d))


def test_a_deformable_convolution_starts_as_an_ordinary_one():
    layer, x, w = modulation.DeformableConv2d(5, 4, w_dim=3, num_kernels=2).double(), double(2, 5, 6, 7), double(2, 3)
    torch.testing.assert_close(layer(x, w), naive_modulated_convolution(layer, x, w, ordinary))
