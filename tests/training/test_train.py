"""Training end to end: resuming exactly, growing, two ranks, folders and shards, learning, mistakes."""

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from common import stopping
from common.cli import UserError
from growth import PATIENCE
from presets import PRESETS
from sampling import views
from sampling.pipeline import draw
from step import Learner, update
from tests import figures
from tests.data.test_sources import good, jpeg, write_shard
from training import loop
from weights import checkpoint
from weights.checkpoint import load_generator

ROOT = Path(__file__).parent.parent.parent
COMMON = ("--data", figures.folder(), "--clip", "emoji", "--workers", 0, "--device", "cpu")


@pytest.fixture(autouse=True)
def quick_preset(monkeypatch):
    set_quick_preset(monkeypatch)


def set_quick_preset(monkeypatch):
    """`quick`: the networks of `tiny`, growing every two steps of four images."""
    recipe = dataclasses.replace(
        figures.TINY.recipe,
        images_per_phase={4: 8, 8: 8, 16: 10**9},
        batch=4,
        fid_samples=8,
        fid_every=8,
        fid_factor=0.0,  # grows by the number of images alone
    )
    monkeypatch.setitem(PRESETS, "quick", dataclasses.replace(figures.TINY, recipe=recipe))


def run(*arguments):
    args = train.parse_args([str(a) for a in (*COMMON, *arguments)])
    training = train.build(args, torch.device("cpu"))
    train.train(training)
    return training


def test_a_run_stopped_and_resumed_is_the_run_uninterrupted(tmp_path):
    """Bit by bit, across two changes of resolution and an R1 step: networks, averages, optimizers and the log."""
    common = ("--preset", "quick", "--sample-every", 100)
    run(*common, "--out", tmp_path / "whole", "--steps", 6)
    for steps in (2, 3, 6):  # the first stop is where the resolution changes
        run(*common, "--out", tmp_path / "parts", "--steps", steps)
    whole, parts = (checkpoint.newest_run(tmp_path / name / "checkpoints", print)[1] for name in ("whole", "parts"))
    assert all(state["progress"].pop("seconds") > 0 for state in (whole, parts))  # all else is the same
    assert whole["phase"] == parts["phase"] and whole["phase"]["number"] == 2
    assert_identical(parts, whole)
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if not k.endswith("seconds")}
            for line in path.read_text().splitlines()
        ]
        for path in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "parts" / "metrics.jsonl")
    ]
    assert logs[0] == logs[1] and [row["step"] for row in logs[0]] == [1, 2, 3, 4, 5, 6]
    assert [row["resolution"] for row in logs[0]] == [4, 4, 8, 8, 16, 16]
    assert [row["step"] for row in logs[0] if "fid" in row] == [2, 4, 6]
    assert [row["step"] for row in logs[0] if "r1" in row] == [1]  # in one step of 16


def assert_identical(a, b):
    """Bitwise, through dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    else:
        assert a == b


def test_a_run_leaves_what_it_promises(tmp_path):
    training = run("--preset", "quick", "--out", tmp_path, "--steps", 3, "--sample-every", 2)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "checkpoints",
        "generator_ema.safetensors",
        "metrics.jsonl",
        "config.json",
        "samples",
        "reference.pt",
    }
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"step_0000002.png", "step_0000003.png"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["preset"] == "quick" and config["recipe"]["batch"] == 4
    generator, clip, notes = load_generator(tmp_path / "generator_ema.safetensors")
    assert generator.config.levels[-1].resolution == 8 == notes["resolution"] and notes["images"] == 12
    text = clip.read(["red circle"])
    z = torch.randn(1, generator.config.z_dim)
    expected = training.learner.ema(z, text.tokens, text.eot, 8).image
    torch.testing.assert_close(generator(z, text.tokens, text.eot).image, expected)
    picture, _ = train.draw_samples(training.learner, training.growth)
    for parameter in training.learner.generator.parameters():
        parameter.data.fill_(float("nan"))  # pictures are of the moving average
    assert train.draw_samples(training.learner, training.growth)[0].tobytes() == picture.tobytes()


def test_an_update_that_is_not_finite_changes_nothing():
    """Neither a weight, nor an average of Adam's, nor its count of steps; the next one is as if it had never been."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.Adam(weights, lr=0.1, betas=(0.0, 0.99), fused=True)
    for gradient in (1.0, float("nan"), 1.0):
        before = [weight.detach().clone() for weight in weights]
        weights[0].grad, weights[1].grad = torch.full((3,), gradient), torch.ones(3)
        report = update(optimizer, [{"loss": torch.ones(())}], "g")
        assert report["rejected"] == math.isnan(gradient)
        assert torch.equal(torch.stack(before), torch.stack(weights)) == math.isnan(gradient)
    assert all(state["step"] == 2 and state["exp_avg_sq"].isfinite().all() for state in optimizer.state.values())


def test_a_phase_ends_at_the_reference_fid_or_when_it_stops_falling(tmp_path):
    training = run("--preset", "quick", "--out", tmp_path, "--steps", 1)
    growth, factor = training.growth, 1.5
    growth.recipe = dataclasses.replace(growth.recipe, fid_factor=factor)
    growth.phase.images, growth.reference_fid[4], growth.phase.best_fid = 0, 1.0, factor * 1.01
    assert growth.reason_to_grow() is None
    growth.phase.best_fid = factor * 0.99
    assert "reference" in growth.reason_to_grow()
    growth.grow()
    assert growth.active == [4, 8] and growth.phase.best_fid == float("inf") and growth.reason_to_grow() is None
    growth.phase.evaluations_since_best = PATIENCE
    assert "stopped falling" in growth.reason_to_grow()


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_it_trains_on_a_folder_and_on_shards(tmp_path, capsys, kind):
    source = tmp_path / "data"
    source.mkdir()
    for i in range(12):
        if kind == "folder":
            (source / f"{i}.jpg").write_bytes(jpeg((20 * i, 0, 0)))
            (source / f"{i}.txt").write_text(f"a red picture number {i}")
    if kind == "folder":
        (source / "broken.jpg").write_bytes(b"broken")
        (source / "broken.txt").write_text("broken")
    else:
        write_shard(source / "00000.tar", [good(i) for i in range(12)] + [{"jpg": b"broken", "txt": b"broken"}])
    out = tmp_path / "run"
    run("--preset", "quick", "--out", out, "--data", source, "--steps", 6)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and rows[-1]["skipped"] >= 1 and rows[-1]["rejected"] == 0
    holds = {"folder": "13 images have a caption in a .txt", "shards": "among them 13 images with a caption"}
    assert holds[kind] in capsys.readouterr().out


def test_shards_with_too_few_pairs_are_one_clear_line(tmp_path):
    write_shard(tmp_path / "00000.tar", [good(i) for i in range(3)])
    with pytest.raises(UserError, match="3 usable pairs"):
        run("--preset", "quick", "--out", tmp_path / "run", "--data", tmp_path, "--steps", 1)


@pytest.mark.tour
def test_a_tiny_model_learns_colors(tmp_path, monkeypatch):
    """At 4×4, where only colors can be seen: the background that the prompt names."""
    preset = figures.TINY
    low = dataclasses.replace(
        preset,
        generator=dataclasses.replace(preset.generator, levels=preset.generator.levels[:1]),
        discriminator=dataclasses.replace(preset.discriminator, levels=preset.discriminator.levels[:1]),
        recipe=dataclasses.replace(preset.recipe, images_per_phase={}, clip_weight=0.0, ema_half_life=500),
    )
    monkeypatch.setitem(PRESETS, "low", low)
    data = figures.write(tmp_path / "figures", count=400)
    run("--preset", "low", "--data", data, "--out", tmp_path, "--steps", 300, "--batch", 32, "--sample-every", 1000)
    generator, clip, _ = load_generator(tmp_path / "generator_ema.safetensors")
    colors = torch.tensor(list(figures.BACKGROUNDS.values())) / 255
    right = []
    for i, background in enumerate(figures.BACKGROUNDS):
        for color in figures.COLORS:
            prompt = f"small {color} circle on {background}"
            images = draw(generator, views.samples(generator, clip, [prompt], num=2, seed=3, psi=1.0)).images
            seen = ((images + 1) / 2).flatten(2).median(2).values  # most of the picture is background
            right += [(torch.cdist(seen, colors).argmin(1) == i).float().mean()]
    assert torch.stack(right).mean() > 0.9  # chance: 0.33


def test_torchrun_with_two_ranks_which_go_on_where_one_was(tmp_path):
    out = tmp_path / "run"
    options = [*map(str, COMMON), "--batch", "4", "--out", str(out)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for ranks, steps in ((1, 2), (2, 5)):
        command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "tests.figures", *options]
        command += ["--steps", str(steps)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert "2 rank(s)" in done.stdout and done.stdout.count("Done. 5 steps") == 1
    assert done.stdout.count("Resuming from step 2.") == 1 and "goes on with ranks 2 instead of 1" in done.stdout
    with safe_open(out / "generator_ema.safetensors", "pt") as file:
        assert json.loads(file.metadata()["notes"])["step"] == 5
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5]


def test_a_new_learning_rate_is_taken_on_resume_and_told(tmp_path, capsys):
    common = ("--preset", "quick", "--out", tmp_path)
    first = run(*common, "--steps", 1).learner
    second = run(*common, "--steps", 2, "--set", "lr_generator=1e-4").learner
    groups = zip(first.optimizer_g.param_groups, second.optimizer_g.param_groups, strict=True)
    factor = 1e-4 / PRESETS["quick"].recipe.lr_generator
    assert all(new["lr"] == pytest.approx(factor * old["lr"]) for old, new in groups)
    assert second.optimizer_d.param_groups[0]["lr"] == first.optimizer_d.param_groups[0]["lr"]
    assert "learning rate of optimizer_g was" in capsys.readouterr().out


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(UserError, match="there is no blur; choose of color, translation"):
        train.preset_of(train.parse_args(["--set", "augment=('blur', 'color')"]))


@pytest.mark.parametrize("kind", ["generator", "checkpoint"])
def test_a_new_run_starts_from_the_weights_of_another(tmp_path, kind):
    common = ("--preset", "quick", "--sample-every", 100)
    first = run(*common, "--out", tmp_path / "first", "--steps", 5).learner
    path = tmp_path / "first" / "generator_ema.safetensors"
    if kind == "checkpoint":
        path = checkpoint.checkpoints(tmp_path / "first" / "checkpoints")[0]
    options = (*COMMON, *common, "--out", tmp_path / "second", "--init", path, "--seed", 9)
    args = train.parse_args([*map(str, options)])
    second = train.build(args, torch.device("cpu"))
    name = "mapping.layers.0.weight"
    started_from = first.generator if kind == "checkpoint" else first.ema
    assert torch.equal(second.learner.generator.get_parameter(name), started_from.get_parameter(name))
    assert torch.equal(second.learner.ema.get_parameter(name), first.ema.get_parameter(name))
    assert second.loop.progress.step == 0 and second.growth.active == [4]


def test_what_a_run_that_goes_on_cannot_use_is_said(tmp_path, capsys):
    common = ("--preset", "quick", "--out", tmp_path / "run")
    run(*common, "--steps", 2)
    run(*common, "--steps", 1, "--init", "other.safetensors")
    said = capsys.readouterr().out
    assert "--init other.safetensors is not used" in said and "Nothing was left to do for --steps 1" in said


def test_a_folder_of_ones_own_is_read_by_a_small_clip_trained_first(tmp_path, monkeypatch):
    """It is kept in the run's folder, and a run that goes on takes it from there, also into another folder or after the
    data moved; without it, the run does not learn with another one.
    """
    monkeypatch.setattr("training.small_clip.STEPS", (3, 3))
    data, out = zebras(tmp_path / "data"), tmp_path / "run"
    common = ("--preset", "quick", "--clip", "train", "--sample-every", 100)
    run(*common, "--data", data, "--out", out, "--steps", 1)
    trained = (out / "clip.safetensors").read_bytes()
    data = data.rename(tmp_path / "moved")
    run(*common, "--data", data, "--out", out, "--steps", 2, "--resume", "moved")
    resume = ("--resume", checkpoint.checkpoints(out / "checkpoints")[0])
    run(*common, "--data", data, "--out", tmp_path / "new", "--steps", 3, *resume)
    assert (out / "clip.safetensors").read_bytes() == (tmp_path / "new/clip.safetensors").read_bytes() == trained
    (out / "clip.safetensors").unlink()
    for folder, how in ((out, ()), (tmp_path / "newer", resume)):
        with pytest.raises(UserError, match=f"{out}/clip.safetensors is missing"):
            run(*common, "--data", data, "--out", folder, "--steps", 3, *how)


def zebras(folder):
    """A folder of pictures whose captions differ."""
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.jpg").write_bytes(jpeg((20 * i, 0, 0)))
        (folder / f"{i}.txt").write_text(f"a zebra number {i}")
    return folder


def test_a_run_stopped_while_its_small_clip_learns_leaves_nothing_half(tmp_path, monkeypatch, run_main):
    def killed(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("training.small_clip.learn", killed)
    data = zebras(tmp_path / "data")
    options = ("--preset", "quick", "--data", data, "--device", "cpu", "--out", tmp_path / "run")
    assert run_main(train.main, *options)[0] == stopping.COME_AGAIN
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints", "samples"}


def test_the_reference_is_kept_in_the_folder_of_the_run(tmp_path, monkeypatch):
    common = ("--preset", "quick", "--out", tmp_path, "--sample-every", 100)
    reference = run(*common, "--steps", 1).growth.reference_fid
    monkeypatch.setattr(train.Growth, "compute_reference", lambda *_: pytest.fail("it is in the run's folder"))
    assert run(*common, "--steps", 2).growth.reference_fid == reference


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--preset", "huge"), "invalid choice: 'huge'"),
        (("--steps", "0"), "not a positive number"),
        (("--batch", "1"), "take 2 or more each"),
        (("--seed", "-1"), "is negative or too large"),
        (("--device", "tpu9"), "use auto, cpu, cuda"),
        (("--data", "/nowhere"), "no such file or folder"),
        (("--resume", "/nowhere.pt"), "no such checkpoint"),
        (("--clip", "nonsense"), "neither a file nor"),
        (("--out", "/proc/run"), "cannot be written"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    command = ["train.py", "--preset", "quick", *map(str, COMMON), "--out", str(tmp_path / "run"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        train.main()
    stderr = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and says in stderr.splitlines()[-1] and "Traceback" not in stderr


@pytest.mark.parametrize("content", ["nothing", "the authors' generator"])
def test_what_is_no_checkpoint_of_a_run_is_set_aside(tmp_path, content):
    common = ("--preset", "quick", "--out", tmp_path)
    run(*common, "--steps", 1)
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
        if content != "nothing":
            torch.save({"generator_smooth": {}, "generator": {}}, path)
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        run(*common, "--steps", 2)
    assert len(list((tmp_path / "checkpoints").glob("*.damaged"))) == 2


def test_the_last_checkpoints_are_kept(tmp_path):
    common = ("--preset", "quick", "--out", tmp_path, "--save-every", 1, "--keep", 2)
    run(*common, "--steps", 4)
    assert [path.name[:9] for path in checkpoint.checkpoints(tmp_path / "checkpoints")] == ["00000004-", "00000003-"]


def test_a_checkpoint_is_due_after_some_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.time, "monotonic", itertools.count(step=20).__next__)  # seconds; a step looks twice
    common = ("--preset", "quick", "--out", tmp_path, "--save-minutes", 1, "--keep", 9)
    run(*common, "--steps", 5)
    steps = [int(path.name[:8]) for path in checkpoint.checkpoints(tmp_path / "checkpoints")]
    assert steps[0] == 5 and steps[-1] == 0 and 2 < len(steps) < 6


def test_a_run_is_not_overwritten_nor_resumed_as_another(tmp_path):
    common = ("--preset", "quick", "--out", tmp_path)
    run(*common, "--steps", 1)
    with pytest.raises(UserError, match="holds a run"):
        run(*common, "--steps", 2, "--resume", "no")
    with pytest.raises(UserError, match="started with --seed 0"):
        run(*common, "--steps", 2, "--seed", 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_run_hears_that_it_is_to_stop(number):
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored, by the run too
    with pytest.raises(SystemExit) as ended, stopping.listening():
        os.kill(os.getpid(), number)
        if stopping.asked():
            raise stopping.Stopped
    assert ended.value.code == stopping.COME_AGAIN


def test_an_interrupt_loses_nothing(tmp_path, monkeypatch, capsys):
    arguments = (*COMMON, "--preset", "quick", "--out", tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments), "--steps", "5"])
    step = Learner.step

    def interrupted(self, number, micro_batches):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # in the middle of the second step
        return step(self, number, micro_batches)

    monkeypatch.setattr(Learner, "step", interrupted)
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == stopping.COME_AGAIN
    assert "Stopped and saved" in capsys.readouterr().out
    assert checkpoint.checkpoints(tmp_path / "checkpoints")[0].name.startswith("00000002-")
    monkeypatch.setattr(Learner, "step", step)
    train.main()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_tensorboard_has_the_scalars_the_experts_and_the_pictures(tmp_path):
    run("--preset", "quick", "--out", tmp_path, "--steps", 5, "--sample-every", 5, "--tensorboard")
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert tags["images"] == ["samples"]
    assert {"discriminator/d_loss", "generator/g_loss", "run/resolution", "FID/fid"} <= set(tags["scalars"])
    shares = [board.Scalars(f"experts/8.0.0, share of expert {expert}")[0].value for expert in range(4)]
    assert sum(shares) == pytest.approx(1)
    assert [event.step for event in board.Scalars("generator/g_loss")] == [1, 2, 3, 4, 5]
