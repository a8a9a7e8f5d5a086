"""Pictures that say how they were made, and folders of thousands."""

import errno
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

import sample
from sampling import files
from sampling.pipeline import Pipeline
from tests.fake_cuda import ROOT
from weights.generator_file import DEMO, content, load_generator, save_generator


@pytest.fixture
def each(run_main, tmp_path):
    """sample.py --each with arguments → exit status, stdout, stderr."""
    return lambda *arguments: run_main(sample.main, *arguments, "--device", "cpu", "--each", tmp_path / "all")


def lines(folder):
    return [json.loads(line) for line in (folder / files.INDEX).read_text(encoding="utf-8").splitlines()]


def test_every_picture_says_how_it_was_made(each, run_main, tmp_path):
    status, stdout, stderr = each("red heart", "пингвин 🐧", "--num", 3, "--seed", 5, "--truncation", 0.5)
    assert status == 0 and "6 new pictures, 6 in all" in stdout, stderr
    listed = lines(tmp_path / "all")
    assert [about["file"] for about in listed] == sorted(p.name for p in (tmp_path / "all").glob("*.png"))
    assert [(about["prompt"], about["number"]) for about in listed][3:] == [("пингвин 🐧", n) for n in range(3)]
    assert Image.open(tmp_path / "all" / "000000.png").size == (Pipeline.load(device="cpu").resolution,) * 2
    assert files.how_made(tmp_path / "all" / "000004.png") == listed[4]
    status, stdout, _ = run_main(sample.main, "--show", tmp_path / "all" / "000004.png")
    assert status == 0 and "prompt: пингвин 🐧" in stdout and "seed: 5" in stdout and "psi: 0.5" in stdout


def test_a_picture_is_written_through_a_link_and_an_error_of_the_disk_says_so(run_main, tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    assert run_main(sample.main, "red heart", "--num", 1, "--device", "cpu", "--out", tmp_path / "link.png")[0] == 0
    about = files.how_made(tmp_path / "a.png")
    assert about["prompts"] == ["red heart"] and about["seed"] == 0 and "'red heart' --num 1" in about["command"]
    assert (tmp_path / "link.png").is_symlink()
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OSError, match=r"taken\.png"):
        files.save([Image.new("RGB", (4, 4))], tmp_path / "taken.png", {})


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif"])
def test_only_a_picture_of_ours_is_replaced(run_main, tmp_path, name):
    """Also one behind a link, one that another program wrote over ours, and one that mentions Aurora."""
    path, options = tmp_path / name, ("red heart", "--num", 1, "--resolution", 64, "--device", "cpu", "--out")
    for _ in range(2):
        assert run_main(sample.main, *options, path)[0] == 0
    Image.open(path).convert("L").save(path, comment=b"northern lights, aurora\0", exif=b"Exif\0\0aurora\0")
    (tmp_path / "link").with_suffix(path.suffix).symlink_to(path)
    before = path.read_bytes()
    for out in (path, (tmp_path / "link").with_suffix(path.suffix)):
        status, _, error = run_main(sample.main, *options, out)
        assert status == 2 and "exists, and this command did not make it; give another --out" in error
    assert path.read_bytes() == before


def test_two_processes_that_write_one_file_do_not_mix(tmp_path):
    """It has the bytes of one call."""
    script = """
import sys
from pathlib import Path
from common.disk import atomically
for _ in range(300):
    atomically(Path(sys.argv[1]), lambda temporary: temporary.write_bytes(sys.argv[2].encode() * 10_000))
"""
    commands = [[sys.executable, "-c", script, tmp_path / "same", letter] for letter in "xy"]
    started = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [process.wait() for process in started] == [0, 0]
    assert (tmp_path / "same").read_bytes() in (b"x" * 10_000, b"y" * 10_000)


def test_a_full_disk_is_reported_as_one(run_main, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    for option in ("--out", "--each"):
        path = tmp_path / ("a.png" if option == "--out" else "all")
        status, _, error = run_main(sample.main, "red heart", "--num", 1, "--resolution", 64, option, path)
        assert status == 2 and "No space left on device; make room on that disk" in error and str(path) in error


def test_what_a_foreign_file_says_cannot_control_the_terminal(run_main, tmp_path):
    files.save([Image.new("RGB", (4, 4))], tmp_path / "a.png", {"prompt": "a\033]0;b\x9b2J ψ"})
    assert run_main(sample.main, "--show", tmp_path / "a.png")[1] == "prompt: a\\x1b]0;b\\x9b2J ψ\n"


def test_a_killed_folder_is_completed_with_the_same_pictures(each, tmp_path, monkeypatch):
    monkeypatch.setattr(files.latent, "BATCH", 4)
    arguments = ("red heart", "whale", "--num", 5)
    assert each(*arguments)[0] == 0
    folder = tmp_path / "all"
    whole = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    times = {name: (folder / name).stat().st_mtime_ns for name in whole}
    for name in ("000003.png", "000009.png"):
        (folder / name).unlink()
    (folder / files.INDEX).unlink()
    (folder / ".000003.png.123.unfinished").touch()  # killed within a picture
    assert each(*arguments)[0] == 0
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == whole
    assert not list(folder.glob(".*"))
    assert sorted(about["file"] for about in lines(folder)) == sorted(whole)  # none is missing, none is there twice
    assert all((folder / f"{i:06d}.png").stat().st_mtime_ns == times[f"{i:06d}.png"] for i in (0, 1, 2, 4, 5))


def test_mistakes_are_one_line(each, run_main, tmp_path):
    small = "--num", 2, "--resolution", 64  # without the second stage
    assert each("red heart", *small)[0] == 0
    status, _, stderr = each("whale", *small)
    assert status == 2 and "contains pictures of another command" in stderr and "\n" not in stderr
    other = tmp_path / DEMO.name
    generator, clip, _ = load_generator(DEMO)
    generator.w_avg += 1
    save_generator(other, *content(generator, SimpleNamespace(text=clip, name=""), 64, {}))
    status, _, stderr = each("red heart", *small, "--checkpoint", other)
    assert status == 2 and "or model" in stderr and "\n" not in stderr
    Image.new("RGB", (4, 4)).save(tmp_path / "mine.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, says in (("mine.png", "does not say"), ("text.png", "cannot be read"), ("none.png", "no such file")):
        status, _, stderr = run_main(sample.main, "--show", tmp_path / name)
        assert status == 2 and says in stderr and "\n" not in stderr
    status, _, stderr = run_main(sample.main, "red heart", "--show", tmp_path / "mine.png")
    assert status == 2 and "give no prompt" in stderr
    status, _, stderr = each("red heart", "--seeds", 1, 2)
    assert status == 2 and "not allowed with argument" in stderr
    status, _, stderr = run_main(sample.main, "red heart", "--each", tmp_path / "text.png")
    assert status == 2 and "is a file" in stderr


@pytest.mark.parametrize("name", ["000001.png", "000002.png", files.INDEX])
@pytest.mark.parametrize("content", [b"", b"mine", b"[1, 2]\n", b"my notes, without an end of line"])
def test_a_folder_with_files_of_the_users_is_refused_and_left_alone(each, tmp_path, name, content):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / name).write_bytes(content)
    status, _, stderr = each("red heart", "--num", 2)
    assert status == 2 and "name another folder" in stderr and "\n" not in stderr
    assert (tmp_path / "all" / name).read_bytes() == content
    assert [path.name for path in (tmp_path / "all").iterdir()] == [name]


def test_a_damaged_picture_of_the_folder_is_to_be_deleted(each, tmp_path):
    assert each("red heart", "--num", 2)[0] == 0
    path = tmp_path / "all" / "000001.png"
    whole = path.read_bytes()
    for size in (0, 60, len(whole) // 2):
        path.write_bytes(whole[:size])
        status, _, stderr = each("red heart", "--num", 2)
        assert status == 2 and "000001.png is damaged; delete this file" in stderr and "\n" not in stderr
    path.unlink()
    assert each("red heart", "--num", 2)[0] == 0 and path.read_bytes() == whole


def test_a_folder_that_may_not_be_written_is_one_line(each, tmp_path):
    (tmp_path / "all" / files.INDEX).mkdir(parents=True)
    status, _, stderr = each("red heart", "--num", 2)
    assert status == 2 and files.INDEX in stderr and "\n" not in stderr
