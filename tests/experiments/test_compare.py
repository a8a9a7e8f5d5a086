"""Systems are measured by what they draw and by their logs, and the command writes a table, numbers and a picture."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from baselines.command import Trained
from baselines.ladagan import LadaGAN
from clip import BUILT_IN, load_clip
from experiments import compare
from tests import figures

PROMPTS = ["red heart", "sun"]


@pytest.fixture
def run(tmp_path):
    """The folder of a LadaGAN's run of two steps, and a third that its generator has not seen."""
    torch.manual_seed(0)
    system = LadaGAN(load_clip("emoji"), 32, "cpu")
    folder = tmp_path / "ladagan"
    folder.mkdir()
    trained = Trained(system, SimpleNamespace(batch=32, unconditional=False), [])
    notes = {"clip": "emoji", "step": 2, "images": 64, "seconds": 7200}
    trained.save_generator(folder / "generator_ema.safetensors", trained.state_dict(), notes)
    rows = [{"seconds": 90}, {"seconds": 900, "cpu_seconds": 18}, {"seconds": 9, "cpu_seconds": 9}]
    lines = [json.dumps({"step": step, "images": 32 * step, **row}) for step, row in enumerate(rows, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder, system


def test_training_is_counted_up_to_the_generator(run):
    folder, system = run
    path = compare.generator_of(folder)
    entry = compare.open_system(path, 32)
    measured = compare.measure_training(entry, path)
    assert measured["training images, thousands"] == 0.064
    assert measured["training, hours"] == pytest.approx((90 + 18) / 3600)
    learned = [*system.networks["generator"].parameters(), *system.networks["discriminator"].parameters()]
    assert measured["parameters trained, M"] == sum(p.numel() for p in learned) / 1e6
    (folder / "metrics.jsonl").unlink()
    assert compare.measure_training(entry, path)["training, hours"] == 2


def test_sampling_is_the_ema_and_counted_as_pytorch_does(run):
    folder, system = run
    entry = compare.open_system(compare.generator_of(folder), 32)
    text = system.clip.read(PROMPTS)
    for psi in (1.0, 0.5):
        torch.testing.assert_close(entry.draw(PROMPTS, 3, psi), system.sample(text, 3, 1, psi))
    with FlopCounterMode(display=False) as counter:
        entry.draw(compare.PROMPTS[:1], 0)
    measured = compare.measure_sampling(entry)
    assert measured["GFLOP a picture"] == counter.get_total_flops() / 1e9 > 0.1
    assert measured["parameters of sampling, M"] == sum(p.numel() for p in system.networks["ema"].parameters()) / 1e6


def test_truncation_leaves_one_picture_of_a_prompt(run):
    entry = compare.open_system(compare.generator_of(run[0]), 32)
    reader = SimpleNamespace(
        images=lambda x: x.float().flatten(1), texts=lambda texts: torch.ones(len(texts), 3 * 32**2)
    )
    measured = compare.measure_truncation(entry, SimpleNamespace(prompts=PROMPTS, seed=0, resolution=32), reader)
    assert list(measured) == [1.0, 0.5, 0.0]
    deviations = [deviation for deviation, _ in measured.values()]
    assert deviations[0] > deviations[1] > deviations[2] == pytest.approx(0, abs=1e-6)


def test_a_small_comparison(run, tmp_path, run_main):
    systems = [f"Aurora={figures.generator_file()}", f"LadaGAN={run[0]}"]
    options = ["--data", figures.folder(), "--count", 6, "--prompts", *PROMPTS, "--out", tmp_path]
    status, said, error = run_main(compare.main, *systems, *options)
    assert status == 0, error
    assert "|  | Aurora | LadaGAN | real pictures |" in said and said.count("| ψ = ") == 3
    assert (tmp_path / "compare.md").read_text() in said
    results = json.loads((tmp_path / "compare.json").read_text())["results"]
    assert results["Aurora"].keys() == results["LadaGAN"].keys()
    assert results["Aurora"]["training images, thousands"] == 0
    assert Image.open(tmp_path / "compare.png").width == 2 * 134 + 6


def test_a_distance_is_to_the_others_by_each_network():
    """The others are the same features, moved: the distance is how far, squared."""
    own = {name: torch.randn(8, 3, dtype=torch.float64) for name in ("efficientnet", "judge")}
    moved = {"efficientnet": own["efficientnet"] + 1, "judge": own["judge"] + 2}
    real = {name: torch.cat([torch.randn(8, 3), moved[name]]) for name in own}
    measured = compare.distances_to_others(real, own, 8)
    assert measured == {compare.OTHERS: pytest.approx(3), compare.AS_READ: pytest.approx(12)}
    assert compare.distances_to_others(moved, own, 8) == {compare.OTHERS: None, compare.AS_READ: None}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["Aurora"], "write NAME=PATH"),
        (["Aurora=nothing"], "no checkpoint at nothing"),
        ([f"Aurora={BUILT_IN['emoji']}"], "holds no generator of Aurora"),
        ([f"Aurora={figures.generator_file()}", "--count", 3], "--count 3"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, run_main, arguments, says):
    status, _, error = run_main(compare.main, *arguments, "--out", tmp_path)
    assert status == 2 and says in error.splitlines()[-1]
