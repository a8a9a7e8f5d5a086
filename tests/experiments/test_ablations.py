"""Every variant does what its name says, and a short series of runs ends in a table."""

import pytest
import torch

import aurora
import discriminator
from attention import l2_attention
from aurora import Generator
from evaluation import enlarging, extractors
from experiments import ablations
from modulation import DeformableConv2d
from presets import PRESETS
from tests import figures
from upsampler import Upsampler

FULL = ablations.full_preset("emoji")


def preset(name):
    return ablations.BASE[name].preset(FULL)


def test_variants_of_recipes_and_sizes():
    assert preset("no CLIP loss").recipe.clip_weight == 0 < FULL.recipe.clip_weight
    without = preset("no matching loss").recipe
    assert without.matching_weight_discriminator == without.matching_weight_generator == 0
    assert [level.num_experts for level in preset("one expert").generator.levels] == [0, 1, 1]
    assert {level.num_kernels for level in preset("no adaptive kernels").generator.levels} == {1}
    full = PRESETS["emoji-256"]
    second = {name: variant.preset(full) for name, variant in ablations.SECOND_STAGE.items()}
    assert second["no noise on the input"].generator.input_noise == 0 < full.generator.input_noise
    plain = second["inputs without distortion"].generator
    assert plain.input_bend == plain.input_stain == 0 < full.generator.input_bend * full.generator.input_stain
    assert max(level.num_experts for level in second["one expert"].generator.levels) == 1
    l1_only = second["L1 only"].recipe
    assert l1_only.adversarial_weight == l1_only.clip_weight == l1_only.perceptual_weight == 0 < l1_only.l1_weight


def test_substitutes_replace_our_own_within_the_context():
    own = aurora.Router, aurora.DeformableConv2d
    u, w = torch.randn(2, 9, 64), torch.randn(2, 128)
    with ablations.BASE["router without w"].in_place():
        router = aurora.Router(64, 4, 128)
        assert torch.equal(router(u, w).logits, router(u, 5 * w + 1).logits)
    with ablations.BASE["no MTM"].in_place():
        generator = Generator(FULL.generator)
    assert not any(isinstance(module, DeformableConv2d) for module in generator.modules())
    with torch.no_grad():
        assert generator(torch.randn(1, 128), torch.randn(1, 24, 384), torch.tensor([5])).image.shape[-1] == 16
    with ablations.BASE["dot-product attention"].in_place():
        q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
        torch.testing.assert_close(aurora.l2_attention(q, k, v), (q @ k.mT / 8**0.5).softmax(-1) @ v)
        tied = (q @ q.mT / 8**0.5).softmax(-1) @ v
        torch.testing.assert_close(discriminator.squared_l2_attention(q, v), tied)
    assert (aurora.Router, aurora.DeformableConv2d) == own and aurora.l2_attention is l2_attention


def test_a_second_stage_without_text_makes_the_same_of_every_caption():
    with ablations.SECOND_STAGE["no text"].in_place():
        network = Upsampler(figures.LARGER.generator)
    image, noise = torch.randn(2, 1, 3, 8, 8)
    z, tokens = torch.randn(1, 128), torch.randn(2, 1, 24, 384)
    with torch.no_grad():
        first, second = (network.text_head(read, torch.tensor([eot])) for read, eot in zip(tokens, (3, 9), strict=True))
        made = network(image, noise, z, tokens[0], torch.tensor([3])).image
    assert all(map(torch.equal, first, second)) and made.isfinite().all()


@pytest.mark.parametrize("name", ["emoji", "emoji-256"])
def test_a_short_series_ends_in_a_table(tmp_path, monkeypatch, run_main, name):
    """On a small shard in the place of the emoji, with tiny networks; a step or two of each run."""
    monkeypatch.setattr("data.emoji.SHARD", figures.write_emoji(tmp_path / "emoji.tar.gz"))
    monkeypatch.setattr(ablations, "full_preset", {"emoji": figures.TINY, "emoji-256": figures.LARGER}.get)
    monkeypatch.setattr(ablations, "COUNT", 8)
    monkeypatch.setattr(ablations, "COUNT_LARGE", 8)
    monkeypatch.setattr(extractors, "efficientnet", lambda device: figures.GRID_MEANS)
    monkeypatch.setattr(enlarging, "efficientnet", lambda device: figures.GRID_MEANS)
    options = ["--preset", name, "--only", "full", "full", "--seeds", 2, "--minutes", 0.001, "--out", tmp_path]
    status, stdout, error = run_main(ablations.main, *options)
    assert status == 0 and "| full |" in stdout and stdout.count(" ± ") >= 3, error
    results = sorted((tmp_path / name / "0.001-minutes" / "full").glob("*.json"))
    written = [path.stat().st_mtime_ns for path in results]
    assert [path.name for path in results] == ["0.json", "1.json"]
    assert run_main(ablations.main, *options)[1] == stdout  # finished runs are not repeated
    assert [path.stat().st_mtime_ns for path in results] == written


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--only nothing", "no variant 'nothing'"),
        ("--out /proc/x", "error: /proc/x: No such"),
        ("--minutes 0", "--minutes 0: give a positive number"),
        ("--only full --seeds 1", "0.json is damaged; delete it"),
    ],
)
def test_mistakes_are_one_line(run_main, tmp_path, options, says):
    damaged = tmp_path / "emoji" / "20-minutes" / "full" / "0.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text('{"FID": 1')
    status, _, error = run_main(ablations.main, "--out", tmp_path, *options.split())
    assert status == 2 and says in error.splitlines()[-1]
