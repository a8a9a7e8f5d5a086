"""A file is the old one or the new one, and no other file is touched."""

import os
import stat

import pytest
from safetensors.torch import save_file

from common import disk


def test_a_file_written_atomically_leaves_its_neighbours_alone(tmp_path):
    for name in ("x.png.tmp", ".x.png.tmp", "x.tmp"):
        (tmp_path / name).write_text("mine")
    disk.atomically(tmp_path / "x.png", lambda temporary: temporary.write_text("new"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "x.png": "new",
        "x.png.tmp": "mine",
        ".x.png.tmp": "mine",
        "x.tmp": "mine",
    }


def test_a_file_that_could_not_be_written_is_the_old_one(tmp_path):
    path = tmp_path / "x.png"
    path.write_text("old")

    def fails(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        disk.atomically(path, fails)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.png"]


def test_a_file_has_the_permissions_of_any_other_and_may_have_a_long_name(tmp_path):
    path, other = tmp_path / ("x" * 250), tmp_path / "other"
    other.write_text("")
    for write in (lambda temporary: temporary.write_text("new"), lambda temporary: save_file({}, temporary)):
        disk.atomically(path, write)
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
