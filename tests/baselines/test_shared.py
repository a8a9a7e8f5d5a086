"""Every system learns with its command, resumes bit-identically, and draws; several processes are refused."""

import copy
import functools
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from baselines import muse, shared
from baselines.ladagan import LadaGAN
from baselines.muse import Muse
from baselines.stylegan_t import StyleGANT
from clip import BUILT_IN, load_clip
from tests import ROOT, figures
from tests.conftest import assert_one_line
from tests.training.runs import identical
from training.loop import Loop
from weights import checkpoint, generator_file
from weights.generator_file import DEMO

BATCH, STEPS = 4, 4


@pytest.fixture
def learn(monkeypatch, run_main):
    """system, steps, options → trains up to that step, at which the command itself would not end."""
    monkeypatch.setattr(shared, "NUM_PICTURES", 2)
    monkeypatch.setattr(muse, "TOKENIZER_IMAGES", 2 * BATCH)
    monkeypatch.setattr(muse, "fill", functools.partial(muse.fill, steps=2))

    def learn(system, steps, *options):
        monkeypatch.setattr(shared, "Loop", functools.partial(Loop, last_step=steps))
        return run_main(lambda: shared.main(system), "train", "--batch", BATCH, "--workers", 0, *options)

    return learn


@pytest.fixture
def draw(tmp_path, run_main):
    """system, file, options → draws two pictures into picture.png."""

    def draw(system, path, *options):
        files = "--checkpoint", path, "--out", tmp_path / "picture.png"
        return run_main(lambda: shared.main(system), "sample", "red heart", "--num", 2, *files, *options)

    return draw


@pytest.mark.parametrize("system", [StyleGANT, LadaGAN, Muse])
def test_a_run_resumes_to_the_last_bit_and_draws(tmp_path, learn, draw, system):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for out, steps in ((whole, STEPS), (stopped, STEPS - 1), (stopped, STEPS)):
        status, output, error = learn(system, steps, "--out", out, "--data", figures.folder())
        assert status == 0, error
    assert f"Resuming from step {STEPS - 1}" in output
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) == STEPS
    first, second = (checkpoint.load(checkpoint.checkpoints(out / "checkpoints")[0]) for out in (whole, stopped))
    assert all(identical(first[part], second[part]) for part in ("networks", "optimizers", "generator_file"))
    generator, picture = stopped / "generator_ema.safetensors", tmp_path / "picture.png"
    assert identical(load_file(whole / generator.name), load_file(generator))
    status, output, error = draw(system, generator)
    assert status == 0 and output.startswith("2 picture(s)") and picture.is_file(), error
    truncated = draw(system, generator, "--truncation", 0.5)
    if system is Muse:
        assert_one_line(truncated, "--truncation: Muse does not have this option")
    else:
        assert truncated[0] == 0


@pytest.mark.parametrize(("system_class", "number"), [(StyleGANT, 0), (LadaGAN, 0), (LadaGAN, 1)])
def test_a_step_changes_what_learns_and_nothing_else(system_class, number):
    torch.manual_seed(0)
    system, images = system_class(load_clip("emoji"), 32, "cpu"), torch.rand(4, 3, 32, 32) * 2 - 1
    text = system.clip.read(["red heart", "cat", "sun", "tree"])
    watched = {**system.networks, "clip": system.clip}
    before, kept = copy.deepcopy({name: network.state_dict() for name, network in watched.items()}), images.clone()
    report = system.step(number, images, text, torch.Generator().manual_seed(1))
    changed = {name for name, network in watched.items() if not identical(network.state_dict(), before[name])}
    assert changed == {"generator", "discriminator", "ema"} and torch.equal(images, kept)
    assert ("r1" in report) == (system_class is LadaGAN and number == 0)
    for name in ("generator", "discriminator"):
        for key, parameter in system.networks[name].named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    if system_class is StyleGANT:
        assert not torch.equal(system.networks.ema.x_avg, before["ema"]["x_avg"])


@torch.no_grad()
@pytest.mark.parametrize("system_class", [StyleGANT, LadaGAN])
def test_samples_are_of_the_moving_average_caption_by_caption(system_class):
    system = system_class(load_clip("emoji"), 32, "cpu")
    text, networks = system.clip.read(["red heart", "cat"]), system.networks
    for parameter in networks.generator.parameters():
        parameter.fill_(9)
    images = system.sample(text, seed=4, count=3)
    assert images.shape == (6, 3, 32, 32) and images.abs().max() <= 1
    z = torch.randn(6, 64, generator=torch.Generator().manual_seed(4))
    c = text.embedding[[0, 0, 0, 1, 1, 1]]
    assert torch.equal(images, networks.ema(z, c).clamp(-1, 1))
    assert not torch.equal(images, networks.ema(z, c.flip(0)).clamp(-1, 1))
    same = system.sample(text, seed=4, count=3, truncation=0.0)
    torch.testing.assert_close(same[:3], same[:1].expand(3, -1, -1, -1), rtol=0, atol=1e-5)


def test_generators_that_cannot_be_drawn_are_one_line(tmp_path, draw):
    """Weights that are NaN; another small CLIP than it learned with; a file of another command, or of no generator."""
    clip, path = tmp_path / "clip.safetensors", tmp_path / "generator.safetensors"
    shutil.copyfile(BUILT_IN["emoji"], clip)
    system = LadaGAN(load_clip(str(clip)), 32, torch.device("cpu"))
    next(system.networks.ema.parameters()).fill_(torch.nan)
    generator_file.save_generator(path, *shared.generator_file(system, {"clip": str(clip)}))
    assert_one_line(draw(LadaGAN, path), "not finite")
    shutil.copyfile(BUILT_IN["judge"], clip)
    assert_one_line(draw(LadaGAN, path), "learned with")
    for foreign, says in ((DEMO, "is of another command, not of Muse"), (__file__, "is damaged")):
        assert_one_line(draw(Muse, foreign), says)
    with pytest.raises(ValueError, match="it learned with another"):
        shared.restore(system, {"clip": "another"})


def test_several_processes_are_refused(tmp_path, learn, monkeypatch):
    monkeypatch.setattr(shared.distributed, "world_size", lambda: 2)
    assert_one_line(learn(Muse, 1, "--out", tmp_path), "a baseline learns in one process")


def test_the_command_runs():
    command = [sys.executable, "-m", "baselines.muse", "train", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "runs/muse" in done.stdout and not done.stderr
