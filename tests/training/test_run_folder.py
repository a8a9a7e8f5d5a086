"""The folder of a run: it touches no file of the user's, keeps other runs out, and resumes only the same run."""

import subprocess
import sys

import pytest
import torch

from common.cli import UserError
from training.run_folder import RunFolder
from weights import checkpoint

IDENTITY = {"preset": "tiny", "data": "/my pictures", "batch": 4, "seed": 0, "clip": "emoji"}


def state(step=0):
    return {"progress": {"step": step}, "discriminator": {"weight": torch.randn(3)}, "generator": {}}


def opened(path, **changes):
    """→ a folder, and the state of the run in it."""
    folder = RunFolder(path, IDENTITY | changes)
    return folder, folder.state()


def made(path, steps=(1, 2)):
    """→ a run's folder with checkpoints."""
    folder, _ = opened(path)
    for step in steps:
        folder.save(step, state(step), ({"generator.weight": torch.ones(2)}, {}), 3)
    folder.write_config({"steps": 9})
    return folder


def contents(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_files_of_a_killed_run_are_deleted_and_files_of_the_user_stay(tmp_path):
    of_the_user = ("notes.tmp", "checkpoints/best-a.pt", "checkpoints/99999999-0123456789abcdef", ".metrics.jsonl.tmp")
    unfinished = ("checkpoints/.unfinished/state.pt", "samples/.step_0000050.png.123.unfinished")
    for name in (*of_the_user, *unfinished):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    made(tmp_path, steps=range(1, 6)).generator.unlink()  # killed before the newest generator had its name
    folder, resumed = opened(tmp_path)
    assert resumed["progress"]["step"] == 5
    assert folder.generator.read_bytes() == (folder.last_good / folder.generator.name).read_bytes()
    assert [path.name[:8] for path in checkpoint.checkpoints(folder.checkpoints)] == [f"0000000{n}" for n in (5, 4, 3)]
    assert all((tmp_path / name).read_text() == "mine" for name in of_the_user)
    assert not list(tmp_path.rglob("*.damaged")) and not list(tmp_path.rglob("*.unfinished"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"system": "muse"}, "not of this command"),
        ({"data": "emoji", "batch": 8}, "started with --data '/my pictures', --batch 4; repeat that, or give another"),
    ],
)
def test_a_run_that_is_refused_changes_nothing(tmp_path, changes, says):
    made(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=says):
        opened(tmp_path, **changes)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "samples/step_0000001.png"])
def test_a_new_run_overwrites_no_file_of_another_program(tmp_path, name):
    """For example if --out is the folder of another model, or of a run of a former version."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"model_type": "bert"}\n')
    before = contents(tmp_path)
    with pytest.raises(UserError, match="give another --out"):
        opened(tmp_path)
    assert contents(tmp_path) == before and len(list(tmp_path.rglob("*"))) == 1 + name.count("/")


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    made(tmp_path)
    lock = tmp_path / "checkpoints/.lock"
    script = f"import fcntl; f = open({str(lock)!r}, 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"1\n"
        with pytest.raises(UserError, match="another run is writing to"):
            opened(tmp_path)
        first.kill()
    opened(tmp_path)  # its lock ended with it


def test_the_log_of_a_resumed_run_has_every_step_once(tmp_path):
    """Also if a full disk or a kill cut a line off."""
    folder = made(tmp_path)
    lines = ['{"step": 1}', '{"step": 2, "ima', '{"step": 3}', '{"step": 4}', '{"st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    folder.open_log(3)
    folder.log({"step": 4})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 3}\n{"step": 4}\n'
