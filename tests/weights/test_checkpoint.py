"""Checkpoints: whole or not at all, compared with their digests, and never at the cost of another file."""

import os
import re

import pytest
import torch
from safetensors.torch import save_file

from common import disk
from common.cli import UserError
from tests import figures
from weights import checkpoint
from weights.generator_file import FILE

WEIGHT = torch.randn(300, 400)
STATE = {"identity": {"seed": 5}, "progress": {"step": 3}, "generator": {"w": WEIGHT}, "discriminator": {"w": WEIGHT}}
GENERATOR = {"generator.w": WEIGHT + 1}, {}


def save(folder, step=3, keep=3):
    return checkpoint.save(folder, step, STATE, GENERATOR, keep)


def test_a_checkpoint_is_read_as_it_was_written_even_after_it_is_deleted(tmp_path):
    """It is mapped into memory, and the run that reads it will delete it."""
    path = save(tmp_path)
    assert re.fullmatch("00000003-[0-9a-f]{16}", path.name) and len(list(path.iterdir())) == 2
    state = checkpoint.load(path)
    for file in path.iterdir():
        file.unlink()
    assert state["progress"] == {"step": 3} and torch.equal(state["discriminator"]["w"], WEIGHT)
    assert torch.equal(checkpoint.moving_average(state)["w"], WEIGHT + 1)


@pytest.mark.parametrize("file", [checkpoint.STATE, FILE])
def test_every_flipped_bit_is_noticed(tmp_path, file):
    """torch.load would accept most of them, and so would the checksums that torch.save writes."""
    small = {"identity": {}, "progress": {}, "generator": {"w": torch.randn(9)}}
    path = checkpoint.save(tmp_path, 3, small, ({"generator.w": torch.randn(9)}, {}), keep=1)
    content = (path / file).read_bytes()
    for bit in range(0, 8 * len(content), 31):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / file).write_bytes(flipped)
        with pytest.raises(disk.Damaged):
            checkpoint.load(path)
    (path / file).write_bytes(content)
    checkpoint.load(path)


@pytest.mark.parametrize("file", [checkpoint.STATE, FILE])
@pytest.mark.parametrize("share", [None, 0.5])
def test_a_checkpoint_cut_short_is_put_aside_and_the_one_before_is_read(tmp_path, file, share):
    before, path = save(tmp_path, 2), save(tmp_path, 3)
    content = (path / file).read_bytes()
    (path / file).unlink()
    if share is not None:
        (path / file).write_bytes(content[: int(share * len(content))])
    assert checkpoint.newest(tmp_path)[0] == before
    assert path.with_name(f"{path.name}.damaged").exists() and checkpoint.checkpoints(tmp_path) == [before]


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    path = save(tmp_path)
    torch.save({name: Hostile() for name in STATE}, path / checkpoint.STATE)
    path = path.rename(tmp_path / f"00000004-{disk.digest(path / checkpoint.STATE)}")
    with pytest.raises(UserError, match="contains code, which is not run"):
        checkpoint.load(path)
    assert not (tmp_path / "executed").exists()


def test_the_newest_are_kept_by_step_and_the_users_copies_stay(tmp_path):
    others = ["best-a", "00000011-copy", "00000013-0123456789abcdef (1)"]
    for name in others:
        (tmp_path / name).mkdir()
    paths = [save(tmp_path, step, keep=2) for step in (9, 10, 100_000_000)]
    assert checkpoint.checkpoints(tmp_path) == [paths[2], paths[1]]
    assert {path.name for path in tmp_path.iterdir()} == {*others, paths[1].name, paths[2].name}
    copy = paths[1].rename(tmp_path / "best of all")
    assert checkpoint.load(copy)["progress"] == {"step": 3}


class Killed(BaseException):
    """A stand-in for kill −9: nothing happens after it."""


def test_after_a_kill_at_any_system_call_there_is_a_whole_checkpoint(tmp_path):
    """A run has one checkpoint, writes another and keeps one. The next one removes what the kill left."""
    killed, life = True, 0
    while killed:
        folder = tmp_path / str(life)
        folder.mkdir()
        save(folder, 1, keep=1)
        with pytest.MonkeyPatch.context() as patch:
            killed = killed_after(life, patch, folder)
        path, state = checkpoint.newest(folder)
        assert path.name[:8] in ("00000001", "00000002") and torch.equal(state["generator"]["w"], WEIGHT)
        last = save(folder, 3, keep=1)
        assert list(folder.iterdir()) == [last]  # nothing of the killed life is left
        life += 1
    assert path.name[:8] == "00000002" and life > 10


def test_the_files_of_a_checkpoint_are_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, fsync, replace = set(), os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: flushed.add(os.fstat(file).st_ino) or fsync(file))

    def rename(source, target):
        files = source.iterdir() if source.is_dir() else [source]
        renamed.append({file.stat().st_ino for file in files} <= flushed)
        replace(source, target)

    renamed = []
    monkeypatch.setattr(os, "replace", rename)
    save(tmp_path)
    assert len(renamed) >= 3 and all(renamed)


def killed_after(number, patch, folder):
    """Writes a checkpoint and is killed after this number of system calls → whether that was before the end."""
    calls = iter(range(1000))
    for name in ("mkdir", "open", "fsync", "replace", "rename", "unlink", "rmdir", "chmod"):
        call = getattr(os, name)

        def counted(*args, call=call, **options):
            if next(calls) >= number:
                raise Killed
            return call(*args, **options)

        patch.setattr(os, name, counted)
    try:
        save(folder, 2, keep=1)
    except Killed:
        return True
    return False


def test_a_file_written_atomically_is_the_old_one_or_the_new_one_and_touches_no_other(tmp_path):
    path, other = tmp_path / "x.png", tmp_path / "x.png.tmp"
    other.write_text("mine")

    def fails(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    disk.atomically(path, lambda temporary: temporary.write_text("new"))
    with pytest.raises(OSError, match="No space"):
        disk.atomically(path, fails)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"x.png": "new", "x.png.tmp": "mine"}


BAD = {
    "missing": lambda path: None,
    "garbage": lambda path: path.write_bytes(b"not a checkpoint" * 100),
    "foreign": lambda path: save_file({"x": torch.ones(2)}, path),
    "list": lambda path: torch.save([1, 2], path),
    "truncated": lambda path: path.write_bytes(figures.generator_file().read_bytes()[:50_000]),
}


@pytest.mark.parametrize("content", BAD)
def test_a_file_without_weights_is_one_clear_line(tmp_path, content):
    BAD[content](tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth") as caught:
        checkpoint.load_weights(tmp_path / "x.pth")
    assert len(str(caught.value).splitlines()) == 1
