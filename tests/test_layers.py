"""The building blocks against PyTorch's own functions, or the formula."""

import math

import pytest
import torch
import torch.nn.functional as F

import layers
from aurora import Generator
from tests.conftest import double
from tests.figures import TINY


def test_upsample_inserts_zeros_and_filters():
    x = torch.randn(2, 3, 5, 5)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    zeros = torch.zeros(2, 3, 10, 10)
    zeros[..., ::2, ::2] = x
    padded = F.pad(zeros, (2, 1, 2, 1))
    expected = F.conv2d(padded, (torch.outer(taps, taps) * 4).expand(3, 1, 4, 4), groups=3)
    torch.testing.assert_close(layers.upsample(x), expected)


@pytest.mark.parametrize("lr_mul", [1.0, 0.01])
def test_equalized_layers_start_with_unit_gain(lr_mul):
    x = torch.randn(4096, 256)
    assert layers.Linear(256, 64, lr_mul=lr_mul)(x).std().item() == pytest.approx(1, abs=0.05)
    assert layers.lrelu(x).square().mean().item() == pytest.approx(1.04, abs=0.05)
    torch.testing.assert_close(layers.Linear(3, 2, bias_init=1.0, lr_mul=lr_mul)(torch.zeros(1, 3)), torch.ones(1, 2))


@pytest.mark.parametrize("lr_mul", [1.0, 0.01])
def test_equalized_learning_rate_is_progressive_gans(lr_mul):
    """Ten steps of Adam, beside a layer that multiplies its weight by lr_mul/√fan_in and its bias by lr_mul.

    Its ε is as large as the gradients.
    """
    layer, x, target = layers.Linear(7, 5, bias_init=1.0, lr_mul=lr_mul).double(), double(20, 7), double(20, 5)
    gain = lr_mul / math.sqrt(7)
    weight, bias = (layer.weight / gain).detach().requires_grad_(), (layer.bias / lr_mul).detach().requires_grad_()
    ours = torch.optim.Adam(layers.parameter_groups(layer, 0.03, eps=1e-3), betas=(0.0, 0.99))
    theirs = torch.optim.Adam([weight, bias], 0.03, betas=(0.0, 0.99), eps=1e-3)
    for _ in range(10):
        for optimizer, output in ((ours, layer(x)), (theirs, F.linear(x, weight * gain, bias * lr_mul))):
            optimizer.zero_grad()
            (output - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer.weight, weight * gain)
    torch.testing.assert_close(layer.bias, bias * lr_mul)


def test_every_parameter_is_in_one_group():
    generator = Generator(TINY.generator)
    groups = layers.parameter_groups(generator, 2.0)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in generator.parameters())
    (experts,) = (group for group in groups if any(p.ndim == 3 and p.shape[1] == 32 for p in group["params"]))
    assert experts["lr"] == 2.0 / math.sqrt(128)


def test_pyramid_averages():
    image = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(layers.pyramid(image, [4, 16]), {4: F.avg_pool2d(image, 4), 16: image})
