"""Systems are measured by what they draw and by their logs, and the command writes a table, numbers and a picture."""

import json

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from baselines.ladagan import LadaGAN
from baselines.shared import generator_file
from clip import BUILT_IN, load_clip
from evaluation import extractors
from experiments import compare
from tests import figures
from weights.generator_file import save_generator


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a LadaGAN's run of two steps, and a third that its generator has not seen, and a cut line."""
    monkeypatch.setattr(compare, "BATCH", 2)  # which the costs of drawing are measured with
    torch.manual_seed(0)
    system = LadaGAN(load_clip("emoji"), 32, "cpu")
    folder = tmp_path / "ladagan"
    folder.mkdir()
    notes = {"clip": "emoji", "step": 2, "images": 64, "seconds": 7200}
    save_generator(folder / "generator_ema.safetensors", *generator_file(system, notes))
    lines = [json.dumps({"step": step, "cpu_seconds": seconds}) for step, seconds in enumerate((90, 18, 9), 1)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, lines[0][:-3]]))
    return folder, system


def test_a_systems_cost_is_counted_up_to_its_generator_and_as_pytorch_does(run):
    folder, system = run
    path = compare.generator_of(folder)
    entry = compare.open_system(path, 32)
    measured = compare.measure_training(entry, path)
    learned = [*system.networks["generator"].parameters(), *system.networks["discriminator"].parameters()]
    assert measured["parameters trained, M"] == sum(p.numel() for p in learned) / 1e6
    assert measured["training images, thousands"] == 0.064
    assert measured["training, hours (of a processor, if logged)"] == pytest.approx((90 + 18) / 3600)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')  # of another program
    assert compare.measure_training(entry, path)["training, hours (of a processor, if logged)"] == 2
    (images,) = entry.draw(["red heart", "sun"], 3)
    assert torch.equal(images, system.sample(system.clip.read(["red heart", "sun"]), 3, 1))
    with FlopCounterMode(display=False) as counter:
        list(entry.draw(compare.PROMPTS[:1], 0))
    measured = compare.measure_sampling(entry)
    assert measured["GFLOP a picture"] == counter.get_total_flops() / 1e9 > 0.1
    assert measured["parameters of sampling, M"] == sum(p.numel() for p in system.networks["ema"].parameters()) / 1e6


def test_a_small_comparison(run, tmp_path, run_main, monkeypatch):
    monkeypatch.setattr("data.emoji.SHARD", figures.write_emoji(tmp_path / "emoji.tar.gz"))
    monkeypatch.setattr(extractors, "efficientnet", lambda device: figures.GRID_MEANS)
    systems = [f"Aurora={figures.generator_file()}", f"LadaGAN={run[0]}"]
    status, stdout, error = run_main(compare.main, *systems, "--count", 6, "--out", tmp_path)
    assert status == 0, error
    assert "|  | Aurora | LadaGAN | real pictures |" in stdout and "| variety | " in stdout
    assert (tmp_path / "compare.md").read_text().partition("-->\n")[2] in stdout
    results = json.loads((tmp_path / "compare.json").read_text())["systems"]
    assert results["Aurora"].keys() == results["LadaGAN"].keys()
    assert results["Aurora"]["training images, thousands"] == 0
    assert Image.open(tmp_path / "compare.png").height > 2 * 128


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["Aurora"], "write NAME=PATH"),
        ([f"Aurora={BUILT_IN['emoji']}"], "contains no generator of Aurora"),
        ([f"Aurora={figures.generator_file()}", "--count", 3], "--count 3"),
        ([f"Aurora={figures.generator_file()}", "--out", "taken"], "compare.png: a folder is where a file is needed"),
        ([f"Aurora={figures.generator_file()}"] * 2, "two systems have the same NAME"),
        ([f"real pictures={figures.generator_file()}"], "no room for this NAME"),
        ([f"a|b={figures.generator_file()}"], "no room for this NAME"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, run_main, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken" / "compare.png").mkdir(parents=True)
    status, _, error = run_main(compare.main, "--out", tmp_path, *arguments)
    assert status == 2 and says in error.splitlines()[-1]
