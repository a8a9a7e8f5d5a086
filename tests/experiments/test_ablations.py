"""Every variant is what its name says, and a short series of runs ends in a table and a plot."""

import json
import sys
from concurrent.futures import Executor, Future

import pytest
import torch
from PIL import Image

import aurora
import discriminator
from aurora import Generator
from baselines.ladagan import AdditiveAttention
from experiments import ablations
from modulation import DeformableConv2d
from presets import PRESETS
from tests import figures


@pytest.fixture
def variant(monkeypatch):
    """name → the preset to train; what the variant replaces is put back afterwards."""
    for name in ("Router", "DeformableConv2d", "l2_attention", "ModulatedSelfAttention"):
        monkeypatch.setattr(aurora, name, getattr(aurora, name))
    monkeypatch.setattr(discriminator, "squared_l2_attention", discriminator.squared_l2_attention)
    return lambda name: ablations.VARIANTS[name](ablations.base(6400))


def sizes(preset):
    return sum(p.numel() for p in Generator(preset.generator).parameters())


def test_the_base_is_emoji_up_to_16_and_grows(variant):
    preset = variant("full")
    assert [level.resolution for level in preset.generator.levels] == [4, 8, 16]
    assert preset.recipe.images_per_phase == {4: 0, 8: 1600} and preset.generator.levels[-1].num_kernels == 2
    assert preset.recipe.lr_generator == PRESETS["emoji"].recipe.lr_generator
    assert variant("not progressive").recipe.images_per_phase == {4: 0, 8: 0}


def test_what_is_left_out_by_the_recipe_and_by_sizes(variant):
    full = variant("full")
    assert variant("no CLIP loss").recipe.clip_weight == 0 < full.recipe.clip_weight
    without = variant("no matching loss").recipe
    assert without.matching_weight_discriminator == without.matching_weight_generator == 0
    assert [level.num_experts for level in variant("one expert").generator.levels] == [0, 1, 1]
    assert {level.num_kernels for level in variant("no adaptive kernels").generator.levels} == {1}
    assert sizes(variant("one expert")) < sizes(full) and sizes(variant("no adaptive kernels")) < sizes(full)


def test_the_router_without_w_does_not_hear_it(variant):
    u, w = torch.randn(2, 9, 64), torch.randn(2, 128)
    variant("router without w")
    router = aurora.Router(64, 4, 128)
    assert torch.equal(router(u, w).logits, router(u, 5 * w + 1).logits)


def test_no_mtm_leaves_no_deformable_convolution_and_the_shapes_as_they_were(variant):
    def deformable(preset):
        return any(isinstance(m, DeformableConv2d) for m in Generator(preset.generator).modules())

    assert deformable(variant("full")) and not deformable(variant("no MTM"))
    g = Generator(variant("no MTM").generator)
    image = g(torch.randn(2, 128), torch.randn(2, 24, 384), torch.tensor([5, 7])).image
    assert image.shape == (2, 3, 16, 16)


def test_dot_products_are_what_both_networks_then_attend_by(variant):
    variant("dot-product attention")
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    expected = (q @ k.mT / 8**0.5).softmax(-1) @ v
    torch.testing.assert_close(aurora.l2_attention(q, k, v), expected)
    torch.testing.assert_close(discriminator.squared_l2_attention(q, v), (q @ q.mT / 8**0.5).softmax(-1) @ v)


def test_additive_self_attention_mixes_points_and_hears_w(variant):
    g = Generator(variant("additive self-attention").generator)
    attention, _ = [m for m in g.modules() if isinstance(m, AdditiveAttention)]
    x, w = torch.randn(2, 9, 96, requires_grad=True), torch.randn(2, 192)
    result = attention(x, w)
    (gradient,) = torch.autograd.grad(result[:, 0].sum(), x)
    assert result.shape == x.shape and (gradient != 0).all()  # a point depends on all
    assert not torch.allclose(result, attention(x, w.flip(0)))
    image = g(torch.randn(2, 128), torch.randn(2, 24, 384), torch.tensor([5, 7])).image
    assert image.shape == (2, 3, 16, 16)


class InPlace(Executor):
    """Calls at once, in the main thread, as signals ask."""

    def submit(self, function, *arguments):
        done = Future()
        done.set_result(function(*arguments))
        return done


def test_a_short_series_ends_in_a_table_and_a_plot(tmp_path, monkeypatch, capsys):
    """In one process, and on a small shard in the place of the emoji."""
    monkeypatch.setattr("data.sources.EMOJI", figures.write_emoji(tmp_path / "emoji.tar.gz"))
    monkeypatch.setattr(ablations, "ProcessPoolExecutor", lambda *_, **__: InPlace())
    monkeypatch.setattr(ablations, "COUNT", 8)
    command = "ablations.py --only full --seeds 1 --images 64 --out"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path)])
    ablations.main()
    said = capsys.readouterr().out
    assert "| full |" in said and "minutes a run" in said
    assert Image.open(tmp_path / "ablations.png").width > 1000
    result = tmp_path / "64" / "full" / "0" / "result.json"
    assert json.loads(result.read_text())["images"] == 64
    written = result.stat().st_mtime_ns
    ablations.main()  # what is done is not done again
    assert result.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--only nothing", "no variant 'nothing'"),
        ("--images 8", "a step takes"),
        ("--out /proc/x", "error: /proc/x: No such"),
    ],
)
def test_mistakes_are_told_in_one_line(monkeypatch, capsys, options, says):
    monkeypatch.setattr(sys, "argv", ["ablations.py", *options.split()])
    with pytest.raises(SystemExit):
        ablations.main()
    assert says in capsys.readouterr().err
