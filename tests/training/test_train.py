"""train.py end to end: exact resuming, growing, two ranks, folders and shards, learning, errors."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import explore
import sample
import train
from clip import BUILT_IN, load_clip, load_minilm
from common import stopping
from common.cli import UserError
from growth import Growth
from presets import PRESETS
from sampling import views
from sampling.pipeline import draw
from step import Learner
from tests import figures
from tests.data.files import good, write_shard
from tests.training.runs import COMMON, SHORT, build, identical, log_of, run, state_of
from training import loop
from weights import checkpoint
from weights.generator_file import DEMO, load_generator, load_upsampler, read_safetensors, save_generator


def without_seconds(rows):
    return [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in rows]


@pytest.mark.parametrize("steps", [2, 3])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(undisturbed, stopped_after, monkeypatch, steps):
    """At a change of the resolution and after it: networks, averages, optimizers, the log. The FID's reference comes
    from the run's folder.
    """
    out = stopped_after(steps)
    monkeypatch.setattr(Growth, "compute_reference", lambda *_: pytest.fail("it is in the run's folder"))
    run(*SHORT, "--out", out, "--steps", 5)
    assert identical(state_of(out), state_of(undisturbed)) and state_of(out)["phase"]["number"] == 1
    assert without_seconds(log_of(out)) == without_seconds(log_of(undisturbed))


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
    assert all(torch.equal(value, average[name]) for name, value in upsampler.state_dict().items())


def test_a_run_without_adversarial_loss_does_not_ask_its_untrained_discriminator(tmp_path, monkeypatch):
    """Whether it overfits."""
    monkeypatch.setattr(train, "watched_pairs", lambda *_: pytest.fail("it was asked"))
    run(*SHORT, "--out", tmp_path, "--steps", 1, "--set", "adversarial_weight=0")


def test_a_run_writes_what_it_promises(undisturbed):
    named = {"checkpoints", "generator_ema.safetensors", "metrics.jsonl", "config.json", "samples", "reference.pt"}
    assert {path.name for path in undisturbed.iterdir()} == named
    assert {path.name for path in (undisturbed / "samples").iterdir()} == {f"step_000000{n}.png" for n in (2, 4, 5)}
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["preset"] == "quick" and config["recipe"]["batch"] == 4
    log = log_of(undisturbed)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5] and [row["resolution"] for row in log] == [4, 4, 8, 8, 8]
    assert [row["step"] for row in log if "fid" in row] == [2, 4]
    assert [row["step"] for row in log if "r1" in row] == [1]  # in one step of 16
    generator, _, notes = load_generator(undisturbed)
    assert read_safetensors(undisturbed / "generator_ema.safetensors")[0]["clip"] == load_clip("emoji").name
    assert notes["resolution"] == 8 and notes["images"] == 20 and "ema" not in state_of(undisturbed)  # it is there once
    average = checkpoint.moving_average(state_of(undisturbed))
    assert all(torch.equal(value, average[name]) for name, value in generator.state_dict().items())
    newest = checkpoint.checkpoints(undisturbed / "checkpoints")[0]
    assert (newest / "generator_ema.safetensors").samefile(undisturbed / "generator_ema.safetensors")


def test_a_step_is_divided_as_the_plan_says(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "choose_micro_batches", lambda *_: (2, 1))
    made = build(*SHORT, "--out", tmp_path / "run")
    assert (made.loop.micro_batches, made.learner.r1_images) == (2, 1)


def test_samples_are_of_the_moving_average(stopped_after):
    made = build(*SHORT, "--out", stopped_after(3))
    made.growth.measure_reference(made.source, made.loop.folder.path / "reference.pt")
    picture = train.draw_samples(made.learner, made.growth)
    for parameter in made.learner.generator.parameters():
        parameter.data.fill_(float("nan"))
    assert train.draw_samples(made.learner, made.growth).tobytes() == picture.tobytes()


def test_it_trains_on_shards(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    samples = [good(i) for i in range(12)] + 4 * [{"jpg": b"broken", "txt": b"broken"}]
    write_shard(tmp_path / "data" / "00000.tar", samples)
    run(*SHORT, "--out", tmp_path / "run", "--data", tmp_path / "data", "--steps", 4)
    rows = log_of(tmp_path / "run")
    assert len(rows) == 4 and rows[-1]["skipped"] >= 1 and rows[-1]["rejected"] == 0
    assert "among them 16 images with a caption" in capsys.readouterr().out


def test_shards_with_too_few_pairs_are_one_clear_line(tmp_path):
    write_shard(tmp_path / "00000.tar", [good(i) for i in range(3)])
    with pytest.raises(UserError, match="3 usable pairs"):
        run(*SHORT, "--out", tmp_path / "run", "--data", tmp_path, "--steps", 1)


@pytest.mark.tour
def test_a_tiny_model_learns_colors(tmp_path, monkeypatch):
    """At 4×4, where only colors are visible: the background that the prompt names."""
    preset = figures.TINY
    low = dataclasses.replace(
        preset,
        generator=dataclasses.replace(preset.generator, levels=preset.generator.levels[:1]),
        discriminator=dataclasses.replace(preset.discriminator, levels=preset.discriminator.levels[:1]),
        recipe=dataclasses.replace(preset.recipe, images_per_phase={}, clip_weight=0.0, ema_half_life=500),
    )
    monkeypatch.setitem(PRESETS, "low", low)
    data = figures.write(tmp_path / "figures", count=400)
    options = f"--preset low --data {data} --out {tmp_path} --steps 300 --batch 32 --sample-every 1000"
    run(*COMMON, *options.split())
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


def test_a_new_learning_rate_and_momentum_are_used_on_resume_and_noted(stopped_after, capsys):
    learner = build(
        *SHORT, "--out", stopped_after(3), "--set", "lr_generator=1e-4", "r1_gamma=3", "momentum_generator=0.5"
    ).learner
    fresh = Learner(figures.QUICK, learner.clip, learner.device, torch.float32, 4)
    factor = 1e-4 / figures.QUICK.recipe.lr_generator
    groups = zip(learner.optimizer_g.param_groups, fresh.optimizer_g.param_groups, strict=True)
    assert all(new["lr"] == pytest.approx(factor * old["lr"]) for new, old in groups)
    assert learner.optimizer_d.param_groups[0]["lr"] == fresh.optimizer_d.param_groups[0]["lr"]
    said = capsys.readouterr().out
    assert f"lr_generator was {figures.QUICK.recipe.lr_generator}; now it is " in said
    assert "r1_gamma was" in said and said.count("now it is ") == 3
    assert {group["betas"][0] for group in learner.optimizer_g.param_groups} == {0.5}


def test_a_run_does_not_start_from_weights_that_are_not_finite(undisturbed, tmp_path, run_main):
    metadata, tensors = read_safetensors(undisturbed / "generator_ema.safetensors")
    save_generator(tmp_path / "nan.safetensors", {name: x * torch.nan for name, x in tensors.items()}, metadata)
    options = *SHORT, "--out", tmp_path / "run", "--init", tmp_path / "nan.safetensors"
    status, _, error = run_main(train.main, *options)
    assert status == 2 and "has weights that are not finite; give another file" in error


@pytest.mark.parametrize("kind", ["generator", "generator and discriminator", "checkpoint"])
def test_a_new_run_starts_from_the_weights_of_another(undisturbed, tmp_path, kind):
    path = checkpoint.checkpoints(undisturbed / "checkpoints")[0]
    first = checkpoint.load_weights(path)
    if kind != "checkpoint":
        path = shutil.copy(undisturbed / "generator_ema.safetensors", tmp_path / "mine.safetensors")
    if kind == "generator and discriminator":
        save_file(first["discriminator"], tmp_path / "mine_discriminator.safetensors")
    second, name = build(*SHORT, "--out", tmp_path / "second", "--init", path, "--seed", 9), "mapping.layers.0.weight"
    state = second.learner.discriminator.state_dict()
    same = all(torch.equal(state[each], value) for each, value in first["discriminator"].items())
    assert same == (kind != "generator")
    started_from = first["generator" if kind == "checkpoint" else "ema"]
    assert torch.equal(second.learner.generator.get_parameter(name), started_from[name])
    assert torch.equal(second.learner.ema.get_parameter(name), first["ema"][name])
    assert second.loop.progress.step == 0 and second.growth.active == [4, 8]


def test_an_option_for_several_values_may_be_given_several_times():
    assert train.parse_args(["--set", "a=1", "--set", "b=2", "c=3"]).set == ["a=1", "b=2", "c=3"]
    assert explore.parse_args(["--checkpoint", "a", "--checkpoint", "b"]).checkpoint == [Path("a"), Path("b")]
    assert sample.parse_args(["red heart", "--seeds", "1", "--seeds", "2"]).seeds == [1, 2]


def test_weights_with_more_layers_than_the_preset_are_refused(undisturbed, tmp_path):
    path = shutil.copy(undisturbed / "generator_ema.safetensors", tmp_path / "mine.safetensors")
    weights = checkpoint.load_weights(checkpoint.checkpoints(undisturbed / "checkpoints")[0])["discriminator"]
    save_file(weights | {"text_head.blocks.9.norm1.weight": torch.ones(1)}, tmp_path / "mine_discriminator.safetensors")
    with pytest.raises(UserError, match="give the preset that it was trained with"):
        build(*SHORT, "--out", tmp_path / "second", "--init", path)


def test_it_starts_at_the_highest_resolution_of_the_weights(stopped_after, tmp_path):
    path = checkpoint.checkpoints(stopped_after(1) / "checkpoints")[0]
    assert build(*SHORT, "--out", tmp_path / "second", "--init", path).growth.active == [4]


def test_a_resumed_run_notes_options_that_it_cannot_use(stopped_after, capsys):
    run(*SHORT, "--out", stopped_after(2), "--steps", 1, "--init", "other.safetensors")
    said = capsys.readouterr().out
    assert "--init other.safetensors is not used" in said and "Nothing was left to do for --steps 1" in said


def test_a_small_clip_is_trained_first_for_other_data(tmp_path, monkeypatch, capsys):
    """The run's folder keeps it, and a resumed run uses it, also after the data moved. Without it, the run is not
    resumed with another one.
    """
    monkeypatch.setattr("training.small_clip.STEPS", (3, 3))
    data, out = figures.write(tmp_path / "data", count=12), tmp_path / "run"
    for path in data.glob("*.txt"):
        path.write_text(f"{path.read_text('utf-8')} 猫", "utf-8")
    common = (*SHORT, "--clip", "train")
    run(*common, "--data", data, "--out", out, "--steps", 1)
    assert "reads only parts of 6 of 6 captions, such as “" in capsys.readouterr().out
    trained = (out / "clip.safetensors").read_bytes()
    data = data.rename(tmp_path / "moved")
    build(*common, "--data", data, "--out", out, "--resume", "moved").loop.folder.lock_file.close()
    with pytest.raises(UserError, match="--resume moved"):
        build(*common, "--data", data, "--out", out)
    assert (out / "clip.safetensors").read_bytes() == trained
    data.rename(tmp_path / "data")
    (out / "clip.safetensors").write_bytes(BUILT_IN["judge"].read_bytes())
    with pytest.raises(UserError, match="it learned with small CLIP"):
        build(*common, "--data", tmp_path / "data", "--out", out)
    (out / "clip.safetensors").unlink()
    with pytest.raises(UserError, match=f"{out}/clip.safetensors is missing"):
        build(*common, "--data", tmp_path / "data", "--out", out)


# ----------------------------------------------------------------------------------------------------------------------
# Signals and errors.


def test_captions_that_are_all_the_same_are_told(tmp_path, capsys):
    for number in range(6):
        figures.picture(number, 32, seed=0).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a shape")
    run(*SHORT, "--data", tmp_path, "--out", tmp_path / "run", "--steps", 1)
    assert "all captions are the same" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signals_ask_a_run_to_stop(number):
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored
    with pytest.raises(SystemExit) as ended, stopping.listening():
        assert not stopping.asked()
        os.kill(os.getpid(), number)
        if stopping.asked():
            raise stopping.Stopped
    assert ended.value.code == stopping.COME_AGAIN


def test_an_interrupt_loses_nothing(undisturbed, stopped_after, monkeypatch, run_main):
    step, out = Learner.step, stopped_after(2)

    def interrupted(self, number, micro_batches):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # in the middle of the fourth step
        return step(self, number, micro_batches)

    monkeypatch.setattr(Learner, "step", interrupted)
    status, said, _ = run_main(train.main, *SHORT, "--out", out, "--steps", 5)
    assert status == stopping.COME_AGAIN and "Stopped and saved" in said
    assert checkpoint.checkpoints(out / "checkpoints")[0].name.startswith("00000004-")
    monkeypatch.setattr(Learner, "step", step)
    status, said, _ = run_main(train.main, *SHORT, "--out", out, "--steps", 5)
    assert status == 0 and f"--checkpoint '{out}/generator_ema.safetensors'" in said
    assert identical(state_of(out), state_of(undisturbed))


def test_a_run_that_held_nothing_out_holds_nothing_out_after_its_folder_grew(tmp_path, monkeypatch, capsys):
    """It has learned from all the first pairs, so none of them is new to it."""
    options = (*SHORT, "--data", figures.write(tmp_path / "data", count=12), "--out", tmp_path / "run")
    run(*options, "--steps", 1)
    figures.write(tmp_path / "data", count=16)
    monkeypatch.setattr("data.folder.FEWEST", 16)
    assert not build(*options).source.holds_out and "note: when this run began" in capsys.readouterr().out
    assert build(*options[:-1], tmp_path / "new").source.holds_out


def test_a_run_stopped_while_its_small_clip_learns_leaves_no_half_file(tmp_path, monkeypatch, run_main):
    monkeypatch.setattr("training.small_clip.learn", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    options = ("--preset", "quick", "--data", figures.folder(), "--device", "cpu", "--out", tmp_path / "run")
    assert run_main(train.main, *options)[0] == stopping.COME_AGAIN
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints", "samples"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--batch", "1"), "take 2 or more each"),
        (("--seed", 2**32), "is negative or too large; give 0 to 4294967295"),
        (("--plan", "--batch", "256", "--gpus", "48"), "--batch 256 cannot be shared by --gpus 48"),
        # A group that was half real and half generated would give the discriminator the answer.
        (("--preset", "emoji", "--batch", "12", "--accumulate", "2"), "in 2 parts, of groups of 4 images; "),
        (("--init", DEMO.parent), "is no checkpoint; a run's checkpoints are the folders in its checkpoints/"),
        (("--clip", "nonsense"), "neither a file nor"),
        (("--out", "/proc/run"), "cannot be written"),
        (("--set", "augment=('blur', 'color')"), "there is no blur; choose from color, translation"),
        (("--init", DEMO), "give the preset that it was trained with"),
        (("--clip", "judge"), "--clip judge is for evaluation"),
        (("--set", "crop=33"), "--set crop has no effect on quick"),
        (("--set", "adversarial_weight=0", "r1_gamma=2"), "--set r1_gamma has no effect"),
        (("--preset", "emoji-256", "--set", "clip_lower_every=2"), "--set clip_lower_every has no effect on emoji-256"),
        (("--plan", "--set", "clip_lower_every=0"), "give 1 or more"),
        (("--preset", "emoji-256", "--set", "crop=33"), "--set crop=33: choose 0, or one of 32, 40, 48, 56, 64"),
        (("--gpus", "8"), "--gpus and --hardware are for --plan"),
        (("--set", "steps=7", "--steps", "5"), "--steps and --set steps=… contradict each other"),
        (("--set", "fid_samples=1"), "give 2 or more"),
        (("--set", "steps=0"), "--set steps=0: give 1 or more"),
        (("--set", "momentum_generator=1"), "give less than 1"),
        (("--set", "batch=9999999"), "give 65536 or fewer"),
        (("--data", "emoji", "--caption-key", "text"), "the emoji have captions; leave it out"),
    ],
)
def test_errors_are_one_line(tmp_path, run_main, arguments, says):
    status, _, error = run_main(train.main, *SHORT, "--out", tmp_path / "run", *arguments)
    assert status == 2 and says in error.splitlines()[-1] and "Traceback" not in error
