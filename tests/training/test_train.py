"""train.py end to end: exact resuming, what a run writes, other weights, stopping, errors."""

import contextlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import train
from clip import BUILT_IN, load_minilm
from common import stopping
from common.cli import UserError
from growth import Growth
from step import Learner
from tests import figures
from tests.conftest import assert_one_line
from tests.training.runs import SHORT, build, identical, log_of, run, state_of
from training import loop
from weights import checkpoint
from weights.generator_file import DEMO, load_generator, load_upsampler


@pytest.mark.parametrize("steps", [2, 3])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(undisturbed, stopped_after, monkeypatch, steps):
    """At a change of the resolution and after it: networks, averages, optimizers, and what the log has but times. The
    FID's reference comes from the run's folder.
    """
    out = stopped_after(steps)
    monkeypatch.setattr(Growth, "compute_reference", lambda *_: pytest.fail("it is in the run's folder"))
    run(*SHORT, "--out", out, "--steps", 5)
    assert identical(state_of(out), state_of(undisturbed)) and state_of(out)["phase"]["number"] == 1
    for row, expected in zip(log_of(out), log_of(undisturbed), strict=True):
        assert all(row[name] == value for name, value in expected.items() if not name.endswith("seconds"))


def test_a_resumed_run_of_the_second_stage_is_bit_identical_too(tmp_path, monkeypatch):
    """What it is given, too, is that of the step's number."""
    monkeypatch.setattr(loop, "WATCHED", 2)
    options = (*SHORT, "--preset", "tiny-larger", "--batch", 2, "--set", "fid_samples=4", "fid_every=2")
    for name, steps in (("whole", 2), ("parts", 1), ("parts", 2)):
        run(*options, "--steps", steps, "--out", tmp_path / name)
    whole = state_of(tmp_path / "whole")
    assert identical(state_of(tmp_path / "parts"), whole)
    rows = log_of(tmp_path / "parts")
    assert [row["resolution"] for row in rows] == [16, 32] and rows[-1]["fid"] >= 0
    assert all(row["g_l1"] > 0 and row["g_perceptual"] > 0 and row["d_adversarial"] > 0 for row in rows)
    average, upsampler = checkpoint.moving_average(whole), load_upsampler(tmp_path / "parts", load_minilm())
    assert identical(dict(upsampler.state_dict()), average)


def test_a_run_writes_what_it_promises(undisturbed):
    named = {"checkpoints", "generator_ema.safetensors", "metrics.jsonl", "config.json", "samples", "reference.pt"}
    assert {path.name for path in undisturbed.iterdir()} == named
    assert {path.name for path in (undisturbed / "samples").iterdir()} == {f"step_000000{n}.png" for n in (2, 4, 5)}
    config, log = json.loads((undisturbed / "config.json").read_text()), log_of(undisturbed)
    assert config["preset"] == "quick" and config["recipe"]["batch"] == 4
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5] and [row["resolution"] for row in log] == [4, 4, 8, 8, 8]
    assert [row["step"] for row in log if "fid" in row] == [2, 4]
    assert [row["step"] for row in log if "r1" in row] == [1]  # in one step of 16
    generator, _, notes = load_generator(undisturbed)
    assert notes["resolution"] == 8 and notes["images"] == 20 and notes["clip"] == "emoji"
    assert identical(dict(generator.state_dict()), checkpoint.moving_average(state_of(undisturbed)))


def test_samples_are_of_the_moving_average(stopped_after):
    made = build(*SHORT, "--out", stopped_after(3))
    made.growth.measure_reference(made.source, made.loop.folder.path / "reference.pt")
    picture = train.draw_samples(made.learner, made.growth)
    for parameter in made.learner.generator.parameters():
        parameter.data.fill_(float("nan"))
    assert train.draw_samples(made.learner, made.growth).tobytes() == picture.tobytes()


def test_a_new_learning_rate_and_momentum_are_used_on_resume_and_noted(stopped_after, capsys):
    changed = "--set", "lr_generator=1e-4", "momentum_generator=0.5"
    learner = build(*SHORT, "--out", stopped_after(3), *changed).learner
    fresh = Learner(figures.QUICK, learner.clip, learner.device, torch.float32, 4)
    factor = 1e-4 / figures.QUICK.recipe.lr_generator
    groups = zip(learner.optimizer_g.param_groups, fresh.optimizer_g.param_groups, strict=True)
    assert all(new["lr"] == pytest.approx(factor * old["lr"]) for new, old in groups)
    assert learner.optimizer_d.param_groups[0]["lr"] == fresh.optimizer_d.param_groups[0]["lr"]
    assert capsys.readouterr().out.count("now it is ") == 2
    assert {group["betas"][0] for group in learner.optimizer_g.param_groups} == {0.5}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what is mapped into memory")
def test_a_resumed_run_lets_go_of_its_checkpoint(stopped_after):
    """On NFS, the folder of a file that is still mapped into memory cannot be deleted."""
    made = build(*SHORT, "--out", stopped_after(3))
    assert made.learner.optimizer_g.state and str(made.loop.folder.path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("kind", ["generator", "checkpoint"])
def test_a_new_run_starts_from_the_weights_of_another(undisturbed, tmp_path, kind):
    path = checkpoint.checkpoints(undisturbed / "checkpoints")[0]
    first = checkpoint.load_weights(path)
    if kind == "generator":
        path = shutil.copy(undisturbed / "generator_ema.safetensors", tmp_path / "mine.safetensors")
    second = build(*SHORT, "--out", tmp_path / "second", "--init", path, "--seed", 9)
    learner = second.learner
    assert identical(dict(learner.discriminator.state_dict()), first["discriminator"]) == (kind == "checkpoint")
    assert identical(dict(learner.generator.state_dict()), first["generator" if kind == "checkpoint" else "ema"])
    assert identical(dict(learner.ema.state_dict()), first["ema"])
    assert second.loop.progress.step == 0 and second.growth.active == [4, 8]


def test_a_small_clip_is_trained_first_for_other_data(tmp_path, monkeypatch):
    """The run's folder keeps it, and a resumed run uses it. The run is not resumed with another one."""
    monkeypatch.setattr("training.small_clip.STEPS", (3, 3))
    options = (*SHORT, "--clip", "train", "--out", tmp_path, "--steps", 1)
    run(*options)
    path = tmp_path / "clip.safetensors"
    trained = path.read_bytes()
    build(*options).loop.folder.lock_file.close()
    assert path.read_bytes() == trained
    path.write_bytes(BUILT_IN["judge"].read_bytes())
    with pytest.raises(UserError, match="it learned with small CLIP"):
        build(*options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_signals_ask_a_run_to_stop(number):
    with pytest.raises(SystemExit) as ended, stopping.listening():
        assert not stopping.asked()
        os.kill(os.getpid(), number)
        if stopping.asked():
            raise stopping.Stopped
    assert ended.value.code == stopping.COME_AGAIN


@pytest.mark.parametrize("output", ["a pipe that nobody reads", "a full disk"])
def test_a_run_outlives_its_output(monkeypatch, output):
    """After Ctrl-C in `python train.py | tee log`, tee has ended too."""
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(OSError), open("/dev/full" if "disk" in output else writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with stopping.listening():
            os.kill(os.getpid(), signal.SIGINT)
            print("Saved", flush=True)
            assert stopping.asked()


def test_a_run_stopped_while_its_small_clip_learns_leaves_no_half_file(tmp_path, monkeypatch, run_main):
    monkeypatch.setattr("training.small_clip.learn", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    options = ("--preset", "quick", "--data", figures.folder(), "--device", "cpu", "--out", tmp_path / "run")
    assert run_main(train.main, *options)[0] == stopping.COME_AGAIN
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints", "samples"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--batch", "1"), "take 2 or more each"),
        (("--batch", "100000"), "--batch 100000: give 65536 or fewer"),
        # A group that was half real and half generated would give the discriminator the answer.
        (("--preset", "emoji", "--batch", "12", "--accumulate", "2"), "in 2 parts, of groups of 4 images; "),
        (("--clip", "nonsense"), "neither a file nor"),
        (("--set", "augment=('blur', 'color')"), "there is no blur; choose from color, translation"),
        (("--init", DEMO), "give the preset that it was trained with"),
        (("--clip", "judge"), "--clip judge is for evaluation"),
        (("--preset", "emoji-256", "--set", "crop=33"), "--set crop=33: choose one of 0, 32, 40, 48, 56, 64"),
        (("--set", "steps=7", "--steps", "5"), "--steps and --set steps=… contradict each other"),
        (("--set", "steps=0"), "--set steps=0: give 1 or more"),
        (("--set", "adversarial_weight=0", "clip_weight=0"), "nothing to learn from"),
        (("--plan", "--preset", "emoji", "--batch", "6"), "choose a multiple of 4"),
        (("--data", "emoji", "--caption-key", "text"), "the emoji have captions; leave it out"),
    ],
)
def test_errors_are_one_line(tmp_path, run_main, arguments, says):
    assert_one_line(run_main(train.main, *SHORT, "--out", tmp_path / "run", *arguments), says)


def test_a_batch_that_does_not_fit_into_a_gpu_is_one_line(tmp_path, run_main, monkeypatch):
    monkeypatch.setattr(train, "train", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to …")))
    result = run_main(train.main, *SHORT, "--out", tmp_path / "run")
    assert_one_line(result, "larger --accumulate; --plan computes which")
