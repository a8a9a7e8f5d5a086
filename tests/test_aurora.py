"""The generator as a whole: its text head, its parts, its presets."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aurora import FourierFeatures, Generator
from discriminator import Discriminator
from losses import moe_loss
from presets import PRESETS
from tests import ROOT
from tests.conftest import assert_same_gradients, double
from tests.figures import moved
from text import TextHead
from upsampler import new_generator


@pytest.fixture
def generator(generator_config):
    torch.manual_seed(0)
    return moved(Generator(generator_config).double())


@pytest.fixture
def inputs(generator):
    """z, tokens and eot."""
    return double(3, generator.config.z_dim), double(3, 7, generator.config.clip_width), torch.tensor([6, 2, 4])


@pytest.mark.parametrize("mix_tokens", [True, False], ids=["ours", "the release's"])
def test_the_text_head_is_a_transformer_over_the_words(mix_tokens):
    """PyTorch's layers with the same weights. A token sees the text up to its end; in the release only itself."""
    torch.manual_seed(0)
    head = moved(TextHead(12, 16, num_layers=2, num_heads=2, lr_mul=0.3, mix_tokens=mix_tokens).double())
    tokens, eot = double(2, 7, 12).requires_grad_(), torch.tensor([6, 3])
    masks = {"src_mask": ~torch.eye(7, dtype=torch.bool)}
    if mix_tokens:
        masks = {"src_key_padding_mask": torch.arange(7) > eot[:, None]}
    x = F.linear(tokens, head.align.weight, head.align.bias)
    for block in head.blocks:
        layer = nn.TransformerEncoderLayer(
            16, 2, 64, dropout=0, activation=lambda x: x * torch.sigmoid(1.702 * x), batch_first=True, norm_first=True
        )
        weights = {}
        for name, value in block.state_dict().items():
            name = name.replace("to_qkv.", "self_attn.in_proj_").replace("to_out", "self_attn.out_proj")
            weights[name.replace("mlp_in", "linear1").replace("mlp_out", "linear2")] = value
        layer.double().load_state_dict(weights)
        x = layer(x, **masks)
    expected = []
    for one, end in zip(x, eot.tolist(), strict=True):
        expected.append(torch.cat([one[[end]], one[:end], one[end + 1 :]]))
    expected = torch.stack(expected)
    global_text, local_text = head(tokens, eot)
    ours = torch.cat([global_text[:, None], local_text], 1)
    torch.testing.assert_close(ours, expected)
    assert_same_gradients(ours, expected, [tokens])


def test_the_three_parts_make_the_whole(generator, inputs):
    """The text reaches the image in both ways: through w, and through cross-attention to the local text."""
    z, tokens, eot = inputs
    image = generator(z, tokens, eot).image
    global_text, local_text = generator.text_head(tokens, eot)
    w, other_w = generator.mapping(z, global_text), generator.mapping(z, global_text.roll(1, 0))
    torch.testing.assert_close(generator.synthesis(w, local_text).image, image)
    assert not torch.allclose(generator.synthesis(other_w, local_text).image, image)
    assert not torch.allclose(generator.synthesis(w, local_text.roll(1, 0)).image, image)


def test_each_layer_has_a_code_which_leaves_earlier_images_alone(generator, inputs):
    z, tokens, eot = inputs
    whole, local_text = generator(z, tokens, eot), generator.text_head(tokens, eot)[1]
    ws = whole.w[:, None].repeat(1, generator.synthesis.num_layers, 1)
    torch.testing.assert_close(generator.synthesis(ws, local_text).image, whole.image)
    ws[:, -1] += 1
    other = generator.synthesis(ws, local_text)
    assert torch.equal(other.pyramid[8], whole.pyramid[8]) and not torch.equal(other.image, whole.image)
    assert torch.equal(generator(z, tokens, eot, 8).image, whole.pyramid[8])


def test_fourier_features_begin_with_frequencies_uniform_in_a_disc():
    torch.manual_seed(0)
    squared_radius = FourierFeatures(2000, size=4, w_dim=2).freqs.square().sum(1)  # then this is uniform in [0, 1]
    torch.testing.assert_close(squared_radius.histc(4, 0, 1), torch.full((4,), 500.0), rtol=0, atol=80)


def test_both_networks_of_a_preset_have_the_same_resolutions_and_the_readmes_sizes():
    readme = (ROOT / "README.md").read_text("utf-8")
    stated = {name: sizes for name, *sizes in re.findall(r"\| `([\w-]+)`[^|]*\| ([\d.]+) M[^|]*\+ ([\d.]+) M", readme)}
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            networks = new_generator(preset.generator), Discriminator(preset.discriminator)
        for network, size in zip(networks, stated.pop(name, ()), strict=False):  # the presets of tests have no row
            millions = sum(p.numel() for p in network.parameters()) / 1e6
            assert millions == pytest.approx(float(size), abs=0.05 if "." in size else 0.5), name
        resolutions = preset.generator.resolutions
        assert resolutions == [level.resolution for level in preset.discriminator.levels if level.takes_images]
        assert list(preset.recipe.images_per_phase) == resolutions[:-1]
    assert not stated, "rows without a preset"


def test_recomputing_levels_changes_no_gradient(generator, inputs):
    gradients = []
    for generator.synthesis.recompute in (False, True):
        output = generator(*inputs)
        loss = sum(image.square().sum() for image in output.pyramid.values()) + moe_loss(output, 0.001)
        gradients.append(torch.autograd.grad(loss, list(generator.parameters())))
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)
