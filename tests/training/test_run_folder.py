"""The folder of a run: it touches no file of the user's, keeps other runs out, and is resumed as the run it is."""

import contextlib
import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common import disk, distributed
from common.cli import UserError
from training import run_folder
from training.run_folder import RunFolder
from weights import checkpoint

ROOT = Path(__file__).parent.parent.parent
IDENTITY = {"preset": "tiny", "data": "/pictures", "batch": 4, "seed": 0, "clip": "judge"}
CONFIG = {**IDENTITY, "steps": 9}


def state(step=0):
    return {"progress": {"step": step}, "discriminator": {"weight": torch.randn(3)}, "generator": {}, "ema": {}}


def opened(path, resume="auto", identity=None, **options):
    """A folder made ready, and the state of the run in it."""
    folder = RunFolder(path, IDENTITY | (identity or {}), **options)
    return folder, folder.state(resume)


def made(path, steps=(1, 2), **options):
    """A run's folder with checkpoints."""
    folder, _ = opened(path, **options)
    folder.write_config(CONFIG)
    for step in steps:
        folder.save(step, state(step), ({}, {}), 3)
    folder.wait()
    return folder


def contents(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


USERS_FILES = (
    "notes.tmp",
    "thesis/chapter.tmp",
    "checkpoints/best.tmp",
    "checkpoints/1.tmp",
    "checkpoints/best-a.pt",
    "checkpoints/00000009-copy.pt",
    "checkpoints/99999999-0123456789abcdef.pt.bak",
    "samples/.mine.png.0a0b0c0d.tmp",
    ".metrics.jsonl.tmp",
    "generator_ema.safetensors.tmp",
    "metrics.jsonl.tmp",
)


def test_files_of_the_user_stay_whatever_a_run_does(tmp_path):
    for name in USERS_FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    made(tmp_path, steps=range(1, 9)).open_log(0)
    folder, resumed = opened(tmp_path)
    folder.write_picture(picture(), {}, 50)
    assert resumed["progress"]["step"] == 8
    assert [path.name[:8] for path in checkpoint.checkpoints(folder.checkpoints)] == [
        "00000008",
        "00000007",
        "00000006",
    ]
    assert {name: (tmp_path / name).read_text() for name in USERS_FILES} == dict.fromkeys(USERS_FILES, "mine")
    assert not list(tmp_path.rglob("*.damaged"))


def picture():
    return Image.new("RGB", (4, 4))


def test_what_a_killed_run_left_is_removed(tmp_path):
    made(tmp_path)
    left = [
        tmp_path / "checkpoints/00000003.tmp",
        tmp_path / ".metrics.jsonl.0123abcd.tmp",
        tmp_path / ".generator_ema.safetensors.0123abcd.tmp",
        tmp_path / "samples/.step_0000050.png.0123abcd.tmp",
    ]
    for path in left:
        path.write_bytes(b"half")
    opened(tmp_path)
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize(
    ("resume", "identity", "says"),
    [
        ("no", {}, "holds a run of its own"),
        ("auto", {"seed": 1}, "started with --seed 0"),
        ("auto", {"system": "muse"}, "not of this command"),
        ("auto", {"data": "emoji", "batch": 8}, "started with --data /pictures, --batch 4"),
        ("elsewhere.pt", {}, "holds a run of its own"),
    ],
)
def test_a_run_that_is_refused_changes_nothing(tmp_path, resume, identity, says):
    made(tmp_path)
    (tmp_path / "checkpoints/00000003.tmp").write_bytes(b"half")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=says):
        opened(tmp_path, resume, identity)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "generator_ema.safetensors"])
def test_a_new_run_writes_over_no_file_of_another_program(tmp_path, name):
    """As where --out is the folder of another model."""
    (tmp_path / name).write_text('{"model_type": "bert"}\n')
    with pytest.raises(UserError, match="give another --out"):
        opened(tmp_path)
    assert (tmp_path / name).read_text() == '{"model_type": "bert"}\n'


def test_a_run_killed_before_its_first_checkpoint_can_be_started_again(tmp_path):
    folder, _ = opened(tmp_path)
    folder.write_config(CONFIG)
    folder.open_log(0)
    assert opened(tmp_path)[1] is None


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    script = f"""
        from pathlib import Path
        from training.run_folder import RunFolder
        folder = RunFolder(Path({str(tmp_path)!r}), {IDENTITY})
        folder.state("auto")
        print("ready", flush=True)
        input()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    first = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match="another run is writing to"):
            opened(tmp_path)
    finally:
        first.kill()
        first.communicate()
    opened(tmp_path)  # its lock ended with it


def test_a_disk_without_locks_is_no_hindrance(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "lockf", fails)
    opened(tmp_path)
    assert "would not be noticed" in capsys.readouterr().out
    monkeypatch.setattr(run_folder, "fcntl", None)
    opened(tmp_path)


def test_the_same_data_by_another_path_is_the_same_run(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    (data / "clip.safetensors").write_bytes(b"")
    (tmp_path / "link").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "run", identity={"data": "data", "clip": "data/clip.safetensors"})
    monkeypatch.chdir(data)
    for path in (".", "../data/", str(data), "../link"):
        assert opened(tmp_path / "run", identity={"data": path, "clip": f"{path}/clip.safetensors"})[1]
    with pytest.raises(UserError, match=rf"--data {data}.*--resume moved"):
        opened(tmp_path / "run", identity={"data": "..", "clip": "clip.safetensors"})


def test_a_data_set_that_moved_is_taken_when_that_is_said_and_another_seed_is_not(tmp_path):
    made(tmp_path, identity={"data": "/before"})
    assert opened(tmp_path, "moved", {"data": "/after"})[1]["progress"]["step"] == 2
    with pytest.raises(UserError, match=r"started with --seed 0; repeat that, or give another --out$"):
        opened(tmp_path, "moved", {"data": "/after", "seed": 1})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("emoji", "emoji"),
        ("shards/{00000..00009}.tar", "{here}/shards/{00000..00009}.tar"),
        ("https://host/{0..9}.tar", "https://host/{0..9}.tar"),
        ("pipe:cat x.tar", "pipe:cat x.tar"),
        ("pictures", "{here}/pictures"),
    ],
)
def test_names_urls_and_patterns_are_compared_as_what_they_are(tmp_path, monkeypatch, spec, expected):
    for name in ("emoji", "pictures"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert run_folder.resolved({"data": spec})["data"] == expected.replace("{here}", os.path.realpath(tmp_path))
    assert run_folder.resolved({"clip": "ViT-B-32:openai", "seed": 3}) == {"clip": "ViT-B-32:openai", "seed": 3}


def test_a_run_that_is_shared_out_otherwise_says_so(tmp_path, capsys):
    made(tmp_path, sharing={"accumulate": 1, "workers": 1})
    opened(tmp_path, sharing={"accumulate": 1, "workers": 1})
    assert "note" not in capsys.readouterr().out
    opened(tmp_path, sharing={"accumulate": 2, "workers": 4})
    said = capsys.readouterr().out
    assert "note: the run goes on with accumulate 2 instead of 1, workers 4 instead of 1;" in said
    assert opened(tmp_path)[1]["sharing"] == {"accumulate": 1, "workers": 1, "ranks": 1}


def test_the_main_rank_alone_holds_a_checkpoint_against_its_digest(tmp_path, monkeypatch):
    newest = made(tmp_path).last_good
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "broadcast", lambda _: newest)
    monkeypatch.setattr(checkpoint, "digest", lambda _: pytest.fail("the main rank has read it"))
    folder, resumed = opened(tmp_path)
    assert resumed["progress"]["step"] == 2 and folder.last_good == newest


def test_a_checkpoint_that_the_disk_does_not_give_is_not_called_damaged(tmp_path, monkeypatch):
    made(tmp_path)

    def fails(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "digest", fails)
    with pytest.raises(UserError, match="cannot be read: Input/output error"):
        opened(tmp_path)
    assert len(checkpoint.checkpoints(tmp_path / "checkpoints")) == 2


def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    folder = made(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "atomically", full)
    monkeypatch.setattr(checkpoint, "save_run", full)
    folder.write_config(CONFIG)
    folder.open_log(2)
    folder.log({"step": 3})
    folder.write_picture(picture(), {}, 3)
    folder.save(3, state(3), ({}, {}), 3)
    folder.wait()
    said = capsys.readouterr().out.splitlines()
    told = r"note: .* could not be written \(No space left on device\) .* 00000002-\w+.pt is whole; make room"
    assert len(said) == 4 and all(re.match(told, line) for line in said)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3}\n'  # there was room again
    assert folder.last_good.name.startswith("00000002-")


def test_what_is_in_the_way_of_the_log_is_named(tmp_path, capsys):
    folder = made(tmp_path)
    (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
    (tmp_path / "metrics.jsonl").mkdir()
    folder.open_log(2)
    assert f"see what is in the way at {tmp_path}/metrics.jsonl" in capsys.readouterr().out


def test_a_disk_that_stays_full_is_told_once_and_again_after_there_was_room(tmp_path, capsys):
    folder = made(tmp_path)
    folder.open_log(2)
    room, full = folder.log_file, open("/dev/full", "w")  # noqa: SIM115 - closed below
    for file in (full, full, room, full):
        folder.log_file = file
        folder.log({"step": 3})
    assert capsys.readouterr().out.count("note: metrics.jsonl could not be written") == 2
    with contextlib.suppress(OSError):
        full.close()


def test_a_generator_that_finds_no_room_is_told_apart_from_its_checkpoint(tmp_path, monkeypatch, capsys):
    folder = made(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_generator", full)
    folder.save(3, state(3), ({}, {}), 3)
    folder.wait()
    assert "note: generator_ema.safetensors could not" in capsys.readouterr().out
    assert folder.last_good.name.startswith("00000003-") and folder.saved_step == 3


def test_a_thread_writes_what_was_saved_while_the_run_goes_on(tmp_path, monkeypatch):
    """The state changes in the next step; what is written is whole, and the generator belongs to its checkpoint."""
    folder, may_write = made(tmp_path), threading.Event()
    now, weight = state(3), torch.zeros(3)
    save_run = checkpoint.save_run
    monkeypatch.setattr(checkpoint, "save_run", lambda *args: may_write.wait(60) and save_run(*args))
    folder.save(3, now | {"ema": {"weight": weight}}, ({"generator.weight": weight}, {}), 3)
    weight += 1  # at once, in place
    may_write.set()
    folder.wait()
    assert folder.saved_step == 3
    assert torch.equal(load_file(folder.generator)["generator.weight"], torch.zeros(3))
    assert torch.equal(checkpoint.load_run(folder.last_good)["ema"]["weight"], torch.zeros(3))
