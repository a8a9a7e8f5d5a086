"""The experiments' formulas, and their commands on a few pictures."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import aurora
from baselines.ladagan import LadaGAN
from baselines.shared import generator_file
from clip import load_clip
from evaluation import enlarging, extractors
from experiments import ablations, bench, compare, nearest, probe
from modulation import DeformableConv2d
from tests import figures
from tests.conftest import assert_one_line
from training import small_clip
from weights.generator_file import save_generator


@pytest.fixture
def few_emoji(monkeypatch):
    """A small shard replaces the emoji, and features that need no network replace EfficientNet's."""
    monkeypatch.setattr("data.emoji.SHARD", figures.few_emoji())
    for module in (extractors, enlarging):
        monkeypatch.setattr(module, "efficientnet", lambda device: figures.GRID_MEANS)


def test_substitutes_replace_our_own_within_the_context():
    own = aurora.Router, aurora.DeformableConv2d
    u, w = torch.randn(2, 9, 64), torch.randn(2, 128)
    with ablations.BASE["router without w"].in_place():
        router = aurora.Router(64, 4, 128)
        assert torch.equal(router(u, w).logits, router(u, 5 * w + 1).logits)
    with ablations.BASE["no MTM"].in_place():
        generator = aurora.Generator(ablations.full_preset("emoji").generator)
    assert not any(isinstance(module, DeformableConv2d) for module in generator.modules())
    with torch.no_grad():
        assert generator(torch.randn(1, 128), torch.randn(1, 24, 384), torch.tensor([5])).image.shape[-1] == 16
    assert (aurora.Router, aurora.DeformableConv2d) == own


@pytest.mark.parametrize("name", ["emoji", "emoji-256"])
def test_a_short_series_ends_in_a_table(tmp_path, monkeypatch, run_main, few_emoji, name):
    """With tiny networks; a step or two of each run."""
    monkeypatch.setattr(ablations, "full_preset", {"emoji": figures.TINY, "emoji-256": figures.LARGER}.get)
    monkeypatch.setattr(ablations, "COUNT", 8)
    monkeypatch.setattr(ablations, "COUNT_LARGE", 8)
    monkeypatch.setattr(ablations, "MINUTE", 0.06)
    options = ["--preset", name, "--only", "full", "--seeds", 2, "--minutes", 1, "--out", tmp_path]
    status, stdout, error = run_main(ablations.main, *options)
    assert status == 0 and "| full |" in stdout and stdout.count(" ± ") >= 3, error
    results = sorted((tmp_path / name / "1-minutes" / "full").glob("*.json"))
    written = [path.stat().st_mtime_ns for path in results]
    assert [path.name for path in results] == ["0.json", "1.json"]
    assert run_main(ablations.main, *options)[1] == stdout  # finished runs are not repeated
    assert [path.stat().st_mtime_ns for path in results] == written
    assert_one_line(run_main(ablations.main, "--out", tmp_path, "--only", "nothing"), "no variant 'nothing'")


@pytest.mark.parametrize("case", bench.CASES)
def test_every_case_of_the_benchmark_runs(case, monkeypatch, few_emoji):
    """At tiny sizes, with a stopwatch that calls and does not measure."""
    monkeypatch.setattr(bench, "PRESETS", dict.fromkeys(("aurora-64", "emoji-gpu", "small-64"), figures.TINY))
    monkeypatch.setattr(bench, "POINTS", 64)
    monkeypatch.setattr(bench, "SIDE", 4)
    monkeypatch.setattr(bench, "TRAINED", {"emoji-gpu": 4})
    monkeypatch.setattr(bench, "WARM_UP", 0)
    called = SimpleNamespace(
        device=torch.device("cpu"), dtype=torch.float32, row=lambda name, function, *_: (name, function())
    )
    assert list(bench.CASES[case](called))


def test_a_floor_is_the_time_of_as_many_multiplications_at_the_speed_of_a_large_product(monkeypatch):
    """A product of 2048×2048 matrices takes 2 s here, and a case of a quarter of its FLOP 3 s: 6 times its floor."""
    stopwatch = bench.Stopwatch(torch.device("cpu"), seconds=1)
    case = object()
    monkeypatch.setattr(stopwatch, "time", lambda function, number=1: 3.0 if function is case else 2.0)
    gflop, floor, ours, ratio = map(float, stopwatch.row("", case, 2048**3 / 2).split())
    assert (gflop, floor, ours, ratio) == (4.29, 500, 3000, 6)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a LadaGAN's run of two steps, and the system."""
    monkeypatch.setattr(compare, "BATCH", 2)  # which the costs of drawing are measured with
    system = LadaGAN(load_clip("emoji"), 32, "cpu")
    folder = tmp_path / "ladagan"
    folder.mkdir()
    notes = {"clip": "emoji", "step": 2, "images": 64, "seconds": 7200}
    save_generator(folder / "generator_ema.safetensors", *generator_file(system, notes))
    return folder, system


def test_a_systems_cost_is_counted_as_pytorch_does(run):
    folder, system = run
    entry = compare.open_system(folder / "generator_ema.safetensors", 32)
    (images,) = entry.draw(["red heart", "sun"], 3)
    assert torch.equal(images, system.sample(system.clip.read(["red heart", "sun"]), 3, 1))
    with FlopCounterMode(display=False) as counter:
        list(entry.draw(compare.PROMPTS[:1], 0))
    measured = compare.measure_cost(entry)
    assert measured["training images, thousands"] == 0.064 and measured["training, hours"] == 2
    assert measured["GFLOP a picture"] == counter.get_total_flops() / 1e9 > 0.1
    assert measured["parameters of sampling, M"] == sum(p.numel() for p in system.networks["ema"].parameters()) / 1e6


def test_a_small_comparison(run, tmp_path, run_main, few_emoji):
    systems = [f"Aurora={figures.generator_file()}", f"LadaGAN={run[0]}"]
    status, stdout, error = run_main(compare.main, *systems, "--count", 6, "--out", tmp_path)
    assert status == 0, error
    assert "|  | Aurora | LadaGAN | real pictures |" in stdout and "| variety | " in stdout
    assert (tmp_path / "compare.md").read_text().partition("-->\n")[2] in stdout
    results = json.loads((tmp_path / "compare.json").read_text())["systems"]
    assert results["Aurora"].keys() == results["LadaGAN"].keys()
    assert Image.open(tmp_path / "compare.png").height > 2 * 128


def test_mistakes_in_a_comparison_are_one_line(tmp_path, run_main):
    for arguments, says in ((["Aurora"], "write NAME=PATH"), (["A=x", "A=x"], "two systems have the same NAME")):
        status, _, error = run_main(compare.main, "--out", tmp_path, *arguments)
        assert status == 2 and says in error.splitlines()[-1]


def test_the_nearest_are_those_of_the_largest_cosine():
    torch.manual_seed(0)
    features, others = torch.randn(4, 5), torch.randn(9, 5)
    cosines, indices = nearest.nearest(F.normalize(features, dim=1), F.normalize(others, dim=1))
    expected = F.cosine_similarity(features[:, None], others, dim=2).sort(descending=True)
    assert torch.equal(indices, expected.indices[:, :3])
    torch.testing.assert_close(cosines, expected.values[:, :3])


def test_the_picture_has_a_row_for_each_prompt(tmp_path, run_main):
    data, out = figures.write(tmp_path / "data"), tmp_path / "nearest.png"
    options = ["--data", data, "--checkpoint", figures.generator_file(), "--out", out]
    status, _, error = run_main(nearest.main, *options, "red circle", "large blue square")
    assert status == 0 and Image.open(out).width > 4 * 128 and Image.open(out).height > 2 * 128, error
    own = data / "0000.png"
    for main in (nearest.main, small_clip.main):  # a picture of the data is not overwritten
        result = run_main(main, "--data", data, "--out", own, *["red circle"] * (main == nearest.main))
        assert_one_line(result, "this command did not make it")
        assert Image.open(own).format == "PNG"


def test_information_of_equal_of_independent_and_of_noisy_labels():
    """Equal: the entropy. Independent: nothing. A binary channel that flips a quarter: 1 − H(1/4)."""
    a = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert probe.mutual_information(a, a) == pytest.approx(2)
    assert probe.mutual_information(a, torch.tensor([0, 1] * 4)) == pytest.approx(0)
    sent, received = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
    entropy = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert probe.mutual_information(sent, received) == pytest.approx(1 - entropy)


def test_the_mask_is_where_a_picture_is_not_white():
    images = torch.ones(2, 3, 8, 8)
    images[0, 2, 2:4, 4:8] = -1.0  # yellow
    images[1] = 0.9  # nearly white
    assert probe.object_mask(images, 4).tolist() == [[int(i in (6, 7)) for i in range(16)], [0] * 16]


def test_the_demos_experts_know_the_object_at_16x16(run_main, few_emoji):
    """More than of shuffled points, and less than the entropy."""
    status, stdout, error = run_main(probe.main, "--count", 8)
    assert status == 0 and "at 8.0.0" in stdout, error
    found, shuffled, most = (float(line.split()[-1]) for line in stdout.splitlines()[-3:])
    assert 2 * shuffled < found < most
