"""The second stage: it begins as interpolation, all of it learns, and what it learns from."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import losses
import step
import train
from losses import moe_loss
from presets import DiscriminatorLevel, Level, UpsamplerConfig
from tests import figures
from tests.figures import moved
from upsampler import Upsampler, add_detail, crop, distort, draw_input_noise, enlarge, given_images


@pytest.fixture
def config(generator_config):
    """From 16×16 to 64×64, down to 4×4."""
    fields = {field.name: getattr(generator_config, field.name) for field in dataclasses.fields(generator_config)}
    levels = (
        Level(4, 32, num_blocks=1, attn_depth=1, num_experts=4),
        Level(8, 32, num_blocks=2, num_kernels=2, deformable=True),
        Level(16, 32, num_blocks=1),
        Level(32, 16, num_blocks=1),
        Level(64, 8, num_blocks=1, num_kernels=2),
    )
    return UpsamplerConfig(**fields | {"levels": levels}, input_resolution=16)


def inputs(config, batch=2):
    torch.manual_seed(1)
    shape = batch, 3, config.input_resolution, config.input_resolution
    image, noise = torch.rand(shape) * 2 - 1, torch.randn(shape)
    tokens = torch.randn(batch, 7, config.clip_width)
    return image, noise, torch.randn(batch, config.z_dim), tokens, torch.tensor([6, 2])[:batch]


def test_it_begins_as_interpolation(config):
    image, *others = inputs(config)
    output = Upsampler(config)(image, *others)
    assert {r: tuple(x.shape) for r, x in output.pyramid.items()} == {32: (2, 3, 32, 32), 64: (2, 3, 64, 64)}
    once = F.interpolate(image, scale_factor=2, mode="bilinear")
    assert torch.equal(output.pyramid[32], once) and torch.equal(output.image, enlarge(once))
    assert not torch.equal(moved(Upsampler(config))(image, *others).image, output.image)
    white = torch.ones_like(image)
    assert torch.equal(Upsampler(config)(white, *others).image, torch.ones_like(output.image)), "no darker border"


def test_all_of_it_gets_a_gradient_at_every_resolution(config):
    upsampler = moved(Upsampler(config))
    for resolution in (32, 64):
        upsampler.zero_grad(set_to_none=True)
        output = upsampler(*inputs(config), resolution=resolution)
        assert max(output.pyramid) == resolution
        (moe_loss(output, 0.01) + sum(x.square().mean() for x in output.pyramid.values())).backward()
        silent = {name for name, p in upsampler.named_parameters() if p.grad is None or not p.grad.any()}
        above = {f"synthesis.levels.{i}." for i, level in enumerate(config.levels) if level.resolution > resolution}
        assert all(name.startswith(tuple(above)) for name in silent), silent
    assert {name: tuple(r.logits.shape) for name, r in output.routings.items()} == {"4.0.0": (2, 16, 4)}


def test_text_noise_and_image_reach_the_picture(config):
    upsampler = moved(Upsampler(config))
    *given, eot = inputs(config)
    output = upsampler(*given, eot).image
    for i in range(4):
        others = [x.flip(0) if n == i else x for n, x in enumerate(given)]
        assert not torch.allclose(upsampler(*others, eot).image, output), ["image", "noise", "z", "text"][i]


def test_each_resolution_of_the_way_down_is_used_once(config):
    """The lowest is what the way up begins with; each other one is added at its level."""
    upsampler, given = Upsampler(config).eval(), {}
    for level in upsampler.synthesis.levels:
        level.register_forward_hook(lambda level, inputs, _: given.update({level.resolution: (inputs[0], inputs[3])}))
    with torch.no_grad():
        image, noise, *others = inputs(config)
        upsampler(image, noise, *others)
        maps = upsampler.synthesis.encoder(image + config.input_noise * noise)
    assert torch.equal(given[4][0], maps[4]) and given[4][1] is None
    assert torch.equal(given[8][1], maps[8]) and torch.equal(given[16][1], maps[16])
    assert given[32][1] is given[64][1] is None


def test_what_a_level_adds_shifts_no_color():
    """Of its RGB counts what is finer than eight pixels of the input; and that is all of what is finer."""
    torch.manual_seed(0)
    image, rgb = torch.randn(2, 3, 16, 16).double(), torch.randn(2, 3, 32, 32).double()
    added = add_detail(rgb, image, side=16) - enlarge(image)
    shifted = add_detail(rgb + torch.randn(2, 3, 1, 1), image, side=16) - enlarge(image)
    torch.testing.assert_close(shifted, added)
    fine = rgb - F.interpolate(F.avg_pool2d(rgb, 16), scale_factor=16)  # of mean zero in each such square
    torch.testing.assert_close(add_detail(fine, image, side=16) - enlarge(image), fine)
    assert torch.isfinite(add_detail(rgb, image, side=4)).all()  # a crop smaller than such a square


def test_it_is_given_real_pictures_averaged_down_with_noise(config, generator_config):
    images, noise = torch.rand(2, 3, 64, 64), draw_input_noise(config, 2, torch.Generator().manual_seed(0))
    given, its_noise = given_images(config, images, noise)
    torch.testing.assert_close(given, F.avg_pool2d(images, 4))
    assert its_noise.shape == given.shape and torch.equal(its_noise, noise)
    assert given_images(generator_config, images, draw_input_noise(generator_config, 2, None)) == ()


def test_distortions_move_points_by_so_many_pixels_and_change_colors(config):
    torch.manual_seed(0)
    images, distortions = torch.rand(2, 3, 16, 16) * 0.8, torch.zeros(2, 5, 4, 4)
    torch.testing.assert_close(distort(images, distortions, config), images)
    distortions[:, 0] = 3.0  # x
    torch.testing.assert_close(distort(images, distortions, config)[..., :-3], images[..., 3:])
    distortions[:, :2] = torch.tensor([2.0, -2.0])[:, None, None]
    torch.testing.assert_close(distort(images, distortions, config)[..., 2:, :-2], images[..., :-2, 2:])
    distortions[:] = torch.tensor([0.0, 0.0, 1.0, -1.0, 99.0])[:, None, None]
    expected = torch.stack([images[:, 0] + 0.1, images[:, 1] - 0.1, torch.ones(2, 16, 16)], 1)
    torch.testing.assert_close(distort(images, distortions, config), expected)


def test_in_training_its_input_is_distorted_and_the_truth_is_not(tmp_path, monkeypatch):
    args = ["--preset", "tiny-larger", "--data", str(figures.folder()), "--clip", "emoji", "--set", "crop=0"]
    args += ["--out", str(tmp_path / "run")]
    learner = train.build(train.parse_args([*args, "--batch", "2", "--device", "cpu"]), torch.device("cpu")).learner
    batch = next(figures.Figures(32).batches(range(9), 2, 0, 1))
    distorted = learner.prepare(0, 0, [batch])[0]
    monkeypatch.setattr(step, "distort", lambda images, *_: images)
    plain = learner.prepare(0, 0, [batch])[0]
    torch.testing.assert_close(distorted.real[16], F.avg_pool2d(batch.images, 2))
    assert torch.equal(distorted.given[1], plain.given[1])
    torch.testing.assert_close(plain.given[0], F.avg_pool2d(batch.images, 4))
    assert (distorted.given[0] - plain.given[0]).abs().max() > 0.1


def test_crops_of_all_resolutions_show_the_same(config):
    large, places = torch.rand(3, 3, 64, 64), torch.tensor([[0.0, 0.0], [0.99, 0.5], [0.3, 0.99]])
    small, cut = (crop(x, 16, 8, places) for x in (F.avg_pool2d(large, 4), large))
    assert small.shape[-1] == 8 and torch.allclose(F.avg_pool2d(cut, 4), small)
    assert torch.equal(cut[0], large[0, :, :32, :32]) and torch.equal(cut[1], large[1, :, 32:, 16:48])


# ----------------------------------------------------------------------------------------------------------------------
# What it learns from.


def test_the_distance_of_pixels_is_weighed():
    torch.manual_seed(0)
    real, made = ({r: torch.randn(2, 3, r, r).double() for r in (8, 16)} for _ in range(2))
    expected = 0.25 * (made[8] - real[8]).abs().mean() + 0.75 * (made[16] - real[16]).abs().mean()
    torch.testing.assert_close(losses.pixel_distance(made, real, {8: 0.25, 16: 0.75}), expected)


def test_its_judge_scores_only_what_it_makes_and_sees_no_clip(discriminator_config):
    from discriminator import Discriminator

    lowest = DiscriminatorLevel(4, 32, num_blocks=1, takes_images=False)
    config = dataclasses.replace(discriminator_config, levels=(lowest, *discriminator_config.levels[1:]), clip_maps=())
    judge = moved(Discriminator(config))
    pyramid = {r: torch.randn(2, 3, r, r) for r in (8, 16)}
    logits = judge(pyramid, (), torch.randn(2, 7, 12), torch.tensor([6, 2]))
    assert logits.keys() == {(16, 16), (16, 8), (16, 4), (8, 8), (8, 4)}
    assert losses.last_prediction(logits) is logits[16, 4]
    sum(x.sum() for x in logits.values()).backward()
    assert all(p.grad is not None for p in judge.parameters())
