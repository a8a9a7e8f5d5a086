"""Every system learns by its command, resumes to the last bit, and draws; ranks stay equal."""

import copy
import functools
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from baselines import muse, shared
from baselines.ladagan import LadaGAN
from baselines.muse import Muse
from baselines.stylegan_t import StyleGANT
from clip import BUILT_IN, load_clip
from tests import figures
from tests.data.test_sources import COLORS, good, jpeg, write_shard
from tests.training.runs import identical
from tests.training.test_distributed import ROOT, torchrun
from training.loop import Loop
from weights import checkpoint, generator_file
from weights.generator_file import DEMO

BATCH, STEPS = 4, 4


@pytest.fixture
def data(tmp_path):
    """{kind: what --data is given}; the emoji take seconds to look through."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, color in enumerate(COLORS):
        (folder / f"{i}.jpg").write_bytes(jpeg(color))
        (folder / f"{i}.txt").write_text(f"picture {i}\n")
    write_shard(tmp_path / "0.tar", [good(i) for i in range(12)])
    return {"folder": folder, "shards": tmp_path / "0.tar"}


@pytest.fixture
def learn(monkeypatch, run_main):
    """system, steps, options → trains up to so many steps, which the command itself would not end at."""
    monkeypatch.setattr(shared, "NUM_PICTURES", 2)
    monkeypatch.setattr(muse, "TOKENIZER_IMAGES", 2 * BATCH)
    monkeypatch.setattr(muse, "fill", functools.partial(muse.fill, steps=2))
    monkeypatch.setattr(muse, "resample", functools.partial(muse.resample, iterations=1))

    def learn(system, steps, *options):
        monkeypatch.setattr(shared, "Loop", lambda *args, **_: Loop(*args, last_step=steps))
        always = ("--batch", BATCH, "--workers", 0)
        return run_main(lambda: shared.main(system), "train", *always, *options)

    return learn


@pytest.mark.parametrize(
    ("system", "kind"),
    [
        (StyleGANT, "shards"),
        (LadaGAN, "folder"),
        (Muse, "folder"),
    ],
)
def test_a_run_resumes_to_the_last_bit_and_draws(tmp_path, data, learn, run_main, system, kind):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = ["--data", data[kind]]
    for out, steps in ((whole, STEPS), (stopped, STEPS - 1), (stopped, STEPS)):
        status, said, error = learn(system, steps, "--out", out, *options)
        assert status == 0, error
    assert f"Resuming from step {STEPS - 1}" in said and len((stopped / "metrics.jsonl").read_text().splitlines()) == 4
    first, second = (checkpoint.load(checkpoint.checkpoints(out / "checkpoints")[0]) for out in (whole, stopped))
    assert all(identical(first[part], second[part]) for part in ("networks", "optimizers", "generator_file"))
    generator = stopped / "generator_ema.safetensors"
    assert identical(load_file(whole / generator.name), load_file(generator))
    picture = tmp_path / "picture.png"
    draw = ("sample", "red heart", "--num", 2, "--checkpoint", generator, "--out", picture)
    status, said, error = run_main(lambda: shared.main(system), *draw)
    assert status == 0 and said.startswith("2 pictures") and picture.is_file(), error
    for option, value, having in (("--truncation", 0.5, system is not Muse), ("--edit", picture, system is Muse)):
        status, _, error = run_main(lambda: shared.main(system), *draw, option, value)
        assert (status, error) == ((0, "") if having else (2, f"error: {option}: {system.__name__} has none"))


@pytest.mark.parametrize(("system_class", "number"), [(StyleGANT, 0), (LadaGAN, 0), (LadaGAN, 1)])
def test_a_step_changes_what_learns_and_nothing_else(system_class, number):
    torch.manual_seed(0)
    system, images = system_class(load_clip("emoji"), 32, "cpu"), torch.rand(4, 3, 32, 32) * 2 - 1
    text = system.clip.read(["red heart", "cat", "sun", "tree"])
    watched = system.networks | {"clip": system.clip}
    if system_class is StyleGANT:
        watched["features"] = system.features
    before, kept = copy.deepcopy({name: network.state_dict() for name, network in watched.items()}), images.clone()
    report = system.step(number, images, text, torch.Generator().manual_seed(1))
    changed = {name for name, network in watched.items() if not identical(network.state_dict(), before[name])}
    assert changed == {"generator", "discriminator", "ema"} and torch.equal(images, kept)
    assert all(value.ndim == 0 and value.isfinite() for value in report.values())
    assert ("r1" in report) == (system_class is LadaGAN and number == 0)
    for name in ("generator", "discriminator"):
        for key, parameter in system.networks[name].named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    if system_class is StyleGANT:
        assert not torch.equal(system.networks["ema"].x_avg, before["ema"]["x_avg"])


def test_a_run_is_not_resumed_with_other_options(tmp_path, data, learn):
    learn(LadaGAN, 1, "--out", tmp_path / "run", "--seed", 1, "--data", data["folder"])
    status, _, error = learn(LadaGAN, 2, "--out", tmp_path / "run", "--data", data["folder"])
    assert status == 2 and "--seed 1" in error and error.count("\n") == 0


@pytest.mark.parametrize(("path", "says"), [(DEMO, "nothing of this command, not Muse"), (__file__, "is damaged")])
def test_a_foreign_file_is_one_line(run_main, tmp_path, path, says):
    draw = ("sample", "red heart", "--checkpoint", path, "--out", tmp_path / "picture.png")
    status, _, error = run_main(lambda: shared.main(Muse), *draw)
    assert status == 2 and says in error and error.count("\n") == 0


def test_prompts_and_generators_that_cannot_be_drawn_are_one_line(tmp_path, run_main):
    """No words; weights that are NaN; another small CLIP than it learned with; a file of an earlier version."""
    clip, path = tmp_path / "clip.safetensors", tmp_path / "generator.safetensors"
    shutil.copyfile(BUILT_IN["emoji"], clip)
    system = LadaGAN(load_clip(str(clip)), 32, torch.device("cpu"))
    next(system.networks["ema"].parameters()).fill_(torch.nan)
    generator_file.save_generator(path, *shared.generator_file(system, {"clip": str(clip)}))

    def draw(prompt):
        options = ("--num", 1, "--checkpoint", path, "--out", tmp_path / "a.png")
        return run_main(lambda: shared.main(LadaGAN), "sample", prompt, *options)

    told = [draw(" "), draw("red heart " * 50)]
    assert "too long" in told[-1][1]
    shutil.copyfile(BUILT_IN["judge"], clip)
    told.append(draw("red heart"))
    metadata, tensors = generator_file.read_safetensors(path)
    save_file(tensors, path, {name: text for name, text in metadata.items() if name != "clip"})
    told.append(draw("red heart"))
    for (status, _, error), says in zip(
        told, ("is empty", "not finite", "learned with", "earlier version"), strict=True
    ):
        assert status == 2 and says in error and error.count("\n") == 0, error
    system.clip.name = "another"
    with pytest.raises(ValueError, match="it learned with small CLIP"):
        shared.restore(system, {"clip": metadata["clip"]})


def test_ranks_stay_equal(tmp_path):
    """Muse's, as its codebook moves codes to pictures that one rank sees."""
    done = torchrun(2, "tests/baselines/equal_ranks.py", tmp_path, figures.folder())
    assert done.returncode == 0, done.stderr
    assert "2 ranks with 4 equal networks" in done.stdout


def test_the_command_runs_as_a_script():
    command = [sys.executable, "baselines/muse.py", "train", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "runs/muse" in done.stdout, done.stderr
