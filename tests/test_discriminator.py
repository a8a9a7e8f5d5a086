"""The discriminator: its predictions, what depends on what, and R1's second derivatives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attention import merge_heads, split_heads
from discriminator import CLIP_STAGE, Discriminator, MapReader, deviation_in_groups, squared_l2_attention
from tests.conftest import double
from tests.figures import TINY, moved


@pytest.fixture
def discriminator(discriminator_config):
    torch.manual_seed(0)
    return moved(Discriminator(discriminator_config))


def inputs(batch=2, resolutions=(4, 8, 16)):
    """images, CLIP's maps, tokens, eot."""
    images = {r: torch.randn(batch, 3, r, r) for r in resolutions}
    maps = [torch.randn(batch, channels, side, side) for channels, side in TINY.discriminator.clip_maps]
    return images, maps, torch.randn(batch, 7, 12), torch.tensor([6, 3, 5, 2, 4, 1])[:batch]


def test_every_image_is_judged_after_every_stage_from_its_own_on_by_its_caption(discriminator):
    pyramid, seen, tokens, eot = inputs()
    logits = discriminator(pyramid, seen, tokens, eot)
    assert {key: tuple(x.shape) for key, x in logits.items()} == {
        (16, 16): (2, 64), (16, 8): (2, 16), (16, 4): (2, 1), (8, 8): (2, 16), (8, 4): (2, 1), (4, 4): (2, 1),
        (16, CLIP_STAGE): (2, 4),
    }  # fmt: skip
    of_other_captions = discriminator(pyramid, seen, tokens.flip(0), eot.flip(0))
    assert not any(torch.allclose(logits[key], of_other_captions[key]) for key in logits)


@pytest.mark.parametrize("side", [1, 2, 4, 7, 8, 14, 16, 56])
def test_feature_maps_of_any_size_become_one_point(side):
    """Those of the small CLIP, of ViT-B/32, B/16 and L/14, and of ResNet-50."""
    x = torch.randn(2, 3, side, side, requires_grad=True)
    y = MapReader(3, side, 5)(x)
    assert y.shape == (2, 5, 1, 1)
    y.sum().backward()
    assert (x.grad != 0).all()  # it sees the whole map


def test_it_grows_with_the_generator(discriminator):
    """A smaller pyramid is judged as its images are within the whole one."""
    pyramid, seen, *caption = inputs()
    whole = discriminator(pyramid, seen, *caption)
    part = discriminator({r: pyramid[r] for r in (4, 8)}, seen, *caption)
    torch.testing.assert_close(part.pop((8, CLIP_STAGE)), whole[16, CLIP_STAGE])
    assert set(part) == {(8, 8), (8, 4), (4, 4)}
    for key, x in part.items():
        torch.testing.assert_close(x, whole[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_the_deviation_in_groups_is_its_formula(group):
    x = torch.randn(8, 2, 3, 3, dtype=torch.float64)
    deviations = deviation_in_groups(x, group)
    for i in range(8):
        first = i // group * group
        expected = np.sqrt(x[first : first + group].numpy().var(0) + 1e-8)
        assert np.allclose(deviations[i], expected, rtol=1e-12)


@pytest.mark.parametrize(("batch", "group"), [(4, 2), (6, 4)])  # 4 does not divide 6, but their 12 maps
def test_the_images_of_a_group_are_compared_and_no_others(discriminator_config, batch, group):
    discriminator = Discriminator(replace(discriminator_config, group=group))
    pyramid, *others = inputs(batch, (4, 8))
    before = discriminator(pyramid, *others)
    pyramid[8][0] += 1
    after = discriminator(pyramid, *others)
    changed = {key: (after[key] != before[key]).any(1).tolist() for key in before}
    same = [False] * (batch - 2)
    assert changed.pop((8, 4)) == [True, True, *same] and changed.pop((8, 8)) == [True, False, *same]
    assert not any(map(any, changed.values()))


def test_a_prediction_is_its_formula(discriminator_config):
    """Of a discriminator of one stage: 0.25 · (ψ(map, t) + conv1×1(map)), with t of unit length in each channel."""
    lowest = replace(discriminator_config.levels[0], attn_depth=1)
    d = moved(Discriminator(replace(discriminator_config, levels=(lowest,), clip_maps=())).double())
    (stage,), (head,), image = d.stages.values(), d.heads.values(), double(2, 3, 4, 4)
    tokens, eot = double(2, 7, 12), torch.tensor([6, 3])
    attention, block, step = stage.body

    def lrelu(x):
        return torch.where(x < 0, 0.2 * x, x) * 2**0.5

    x = lrelu(F.conv2d(image, stage.from_rgb.weight, stage.from_rgb.bias))
    points = attention.norm(x).flatten(2).mT
    qk, v = (split_heads(project(points), 2) for project in (attention.to_qk, attention.to_v))
    mixed = attention.proj_out(merge_heads(squared_l2_attention(qk, v)))
    x = x + 0.3 * mixed.mT.view_as(x)
    x = x + 0.4 * lrelu(block.conv2(lrelu(block.conv1(x))))
    x = lrelu(F.conv2d(x, step.conv.weight, step.conv.bias)).flatten(2).mT  # [B, 1, C]
    code = d.text_head(tokens, eot)[0]
    code = code / code.square().mean(1, keepdim=True).sqrt()
    h = x
    for conv in head.convs:
        h = lrelu(conv(h, code))
    expected = 0.25 * (head.last(h, code) + F.linear(x, head.unconditional.weight, head.unconditional.bias))[..., 0]
    torch.testing.assert_close(d({4: image}, (), tokens, eot)[4, 4], expected)


def test_squared_l2_attention_is_its_formula_and_twice_differentiable():
    qk, v = (torch.randn(1, 2, 5, d, dtype=torch.float64) for d in (4, 3))
    squared = (qk[..., :, None, :] - qk[..., None, :, :]).square().sum(-1)
    torch.testing.assert_close(squared_l2_attention(qk, v), (-squared / 2).softmax(-1) @ v)
    qk[0, 0, 1] = qk[0, 0, 0]  # two points that meet
    inputs = (qk.requires_grad_(), v.requires_grad_())
    assert torch.autograd.gradcheck(squared_l2_attention, inputs)
    assert torch.autograd.gradgradcheck(squared_l2_attention, inputs)
