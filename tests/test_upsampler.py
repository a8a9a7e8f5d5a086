"""The second stage: it begins as interpolation, all of it learns, and what it learns from."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import losses
import step
from clip import load_clip
from discriminator import Discriminator
from losses import moe_loss
from step import Learner
from tests.figures import LARGER, Figures, moved
from upsampler import Upsampler, add_detail, crop, distort, enlarge

CONFIG = LARGER.generator  # from 8×8 to 32×32, down to 4×4


@pytest.fixture
def inputs():
    """image, noise, z, tokens, eot."""
    torch.manual_seed(1)
    image, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8)
    return image, noise, torch.randn(2, CONFIG.z_dim), torch.randn(2, 7, CONFIG.clip_width), torch.tensor([6, 2])


def test_it_begins_as_interpolation(inputs):
    image, *others = inputs
    output = Upsampler(CONFIG)(image, *others)
    assert {r: tuple(x.shape) for r, x in output.pyramid.items()} == {16: (2, 3, 16, 16), 32: (2, 3, 32, 32)}
    once = F.interpolate(image, scale_factor=2, mode="bilinear")
    assert torch.equal(output.pyramid[16], once) and torch.equal(output.image, enlarge(once))
    white = torch.ones_like(image)
    assert torch.equal(Upsampler(CONFIG)(white, *others).image, torch.ones_like(output.image)), "no darker border"


def test_all_of_it_gets_a_gradient_at_every_resolution(inputs):
    upsampler = moved(Upsampler(CONFIG))
    for resolution in (16, 32):
        upsampler.zero_grad(set_to_none=True)
        output = upsampler(*inputs, resolution=resolution)
        assert max(output.pyramid) == resolution
        (moe_loss(output, 0.01) + sum(x.square().mean() for x in output.pyramid.values())).backward()
        silent = {name for name, p in upsampler.named_parameters() if p.grad is None or not p.grad.any()}
        above = {f"synthesis.levels.{i}." for i, level in enumerate(CONFIG.levels) if level.resolution > resolution}
        assert all(name.startswith(tuple(above)) for name in silent), silent
    assert {name: tuple(r.logits.shape) for name, r in output.routings.items()} == {"4.0.0": (2, 16, 2)}


def test_each_resolution_of_the_way_down_is_used_once(inputs):
    """The lowest is what the way up begins with; each other one is added after its level's first block."""
    upsampler, taken = Upsampler(CONFIG).eval(), {}
    for level in upsampler.synthesis.levels:
        level.register_forward_hook(lambda level, given, out: taken.update({level.resolution: (*given, out[0])}))
    image, noise, *others = inputs
    upsampler(image, noise, *others)
    maps = upsampler.synthesis.encoder(image + CONFIG.input_noise * noise)
    assert torch.equal(taken[4][0], maps[4]) and torch.equal(taken[8][3], maps[8])
    assert taken[4][3] is taken[16][3] is taken[32][3] is None
    x, ws, _, encoded, out = taken[8]
    (block,) = upsampler.synthesis.levels[1].blocks
    torch.testing.assert_close(out, (block(x, ws[:, 0]) + encoded) / 2**0.5)


def test_what_a_level_adds_shifts_no_color():
    """Only what is finer than eight pixels of the input is added, and all of it."""
    torch.manual_seed(0)
    image, rgb = torch.randn(2, 3, 16, 16).double(), torch.randn(2, 3, 32, 32).double()
    added = add_detail(rgb, image, side=16) - enlarge(image)
    shifted = add_detail(rgb + torch.randn(2, 3, 1, 1), image, side=16) - enlarge(image)
    torch.testing.assert_close(shifted, added)
    fine = rgb - F.interpolate(F.avg_pool2d(rgb, 16), scale_factor=16)  # of mean zero in each such square
    torch.testing.assert_close(add_detail(fine, image, side=16) - enlarge(image), fine)
    assert torch.isfinite(add_detail(rgb, image, side=4)).all()  # a crop smaller than such a square


def test_distortions_move_points_by_so_many_pixels_and_change_colors():
    torch.manual_seed(0)
    images, distortions = torch.rand(2, 3, 16, 16) * 0.8, torch.zeros(2, 5, 4, 4)
    torch.testing.assert_close(distort(images, distortions, CONFIG), images)
    distortions[:, 0] = 3.0  # x
    torch.testing.assert_close(distort(images, distortions, CONFIG)[..., :-3], images[..., 3:])
    distortions[:, :2] = torch.tensor([2.0, -2.0])[:, None, None]
    torch.testing.assert_close(distort(images, distortions, CONFIG)[..., 2:, :-2], images[..., :-2, 2:])
    distortions[:] = torch.tensor([0.0, 0.0, 1.0, -1.0, 99.0])[:, None, None]
    expected = torch.stack([images[:, 0] + 0.1, images[:, 1] - 0.1, torch.ones(2, 16, 16)], 1)
    torch.testing.assert_close(distort(images, distortions, CONFIG), expected)


def test_in_training_its_input_is_distorted_and_the_truth_is_not(monkeypatch):
    preset = dataclasses.replace(LARGER, recipe=dataclasses.replace(LARGER.recipe, crop=0))
    learner = Learner(preset, load_clip("emoji"), torch.device("cpu"), torch.float32, batch=2)
    batch = next(Figures(32).batches(range(9), 2, 0, 1))
    distorted = learner.prepare(0, 0, [batch])[0]
    monkeypatch.setattr(step, "distort", lambda images, *_: images)
    plain = learner.prepare(0, 0, [batch])[0]
    torch.testing.assert_close(distorted.real[16], F.avg_pool2d(batch.images, 2))
    assert torch.equal(distorted.given[1], plain.given[1])
    torch.testing.assert_close(plain.given[0], F.avg_pool2d(batch.images, 4))
    assert (distorted.given[0] - plain.given[0]).abs().max() > 0.1


def test_crops_of_all_resolutions_show_the_same():
    large, places = torch.rand(3, 3, 64, 64), torch.tensor([[0.0, 0.0], [0.99, 0.5], [0.3, 0.99]])
    small, cut = (crop(x, 16, 8, places) for x in (F.avg_pool2d(large, 4), large))
    assert small.shape[-1] == 8 and torch.allclose(F.avg_pool2d(cut, 4), small)
    assert torch.equal(cut[0], large[0, :, :32, :32]) and torch.equal(cut[1], large[1, :, 32:, 16:48])


def test_the_distance_of_pixels_is_weighed():
    real, made = ({r: torch.randn(2, 3, r, r).double() for r in (8, 16)} for _ in range(2))
    expected = 0.25 * (made[8] - real[8]).abs().mean() + 0.75 * (made[16] - real[16]).abs().mean()
    torch.testing.assert_close(losses.pixel_distance(made, real, {8: 0.25, 16: 0.75}), expected)


def test_its_judge_scores_only_what_it_makes_and_sees_no_clip():
    judge, pyramid = moved(Discriminator(LARGER.discriminator)), {r: torch.randn(2, 3, r, r) for r in (16, 32)}
    logits = judge(pyramid, (), torch.randn(2, 7, CONFIG.clip_width), torch.tensor([6, 2]))
    assert logits.keys() == {(32, 32), (32, 16), (32, 8), (16, 16), (16, 8)}
    assert losses.last_prediction(logits) is logits[32, 8]
