"""What the commands share."""

import argparse
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.cli import (
    Parser,
    UserError,
    a_path,
    add_data,
    errors_in_one_line,
    finite_number,
    first_line,
    positive_int,
    signals,
)

ROOT = Path(__file__).parent.parent.parent

SCRIPT = """
from common.cli import Parser, UserError, errors_in_one_line
parser = Parser(description="ψ and × …")
parser.add_argument("--size", help="in 4×4 …")
parser.parse_args()
with errors_in_one_line():
    print("64×64 …")
    raise UserError("ψ is not a number, nor is 日本")
"""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([], 2), (["--other"], 2)])
def test_a_console_without_these_characters_shows_question_marks(encoding, arguments, status):
    environment = {"PYTHONIOENCODING": f"{encoding}:strict", "PATH": ""}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == status and b"Traceback" not in done.stderr
    if not arguments:
        assert done.stderr.decode(encoding).startswith("error: ")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            OSError(errno.ENOSPC, "No space left", "a.png"),
            "error: a.png could not be written: No space left; make room",
        ),
        (OSError(errno.EROFS, "Read-only file system", "out/a.png"), "error: out/a.png: Read-only file system\n"),
        (OSError(errno.ENOTDIR, "Not a directory", "out/a.png"), "error: out/a.png: a file or a broken link is where"),
        (MemoryError(), "error: too little memory; ask for fewer"),
        (RuntimeError("CUDA out of memory. Tried"), "error: too little memory; ask for fewer"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: too little memory; ask for fewer"),
        (UserError("--data a\nb: no such folder"), "error: --data a b: no such folder\n"),  # a legal path
    ],
)
def test_errors_of_the_user_and_of_files_are_one_line(error, says, capsys):
    with pytest.raises(SystemExit) as ended, errors_in_one_line():
        raise error
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(says)


def test_ctrl_c_shows_no_traceback(capsys):
    with pytest.raises(SystemExit) as ended, errors_in_one_line():
        raise KeyboardInterrupt
    assert ended.value.code == 130 and capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), RuntimeError("shapes do not match")])
def test_another_error_keeps_its_traceback(error):
    with pytest.raises(type(error), match=str(error.args[-1])), errors_in_one_line():
        raise error


def test_the_first_line_of_an_error_says_something():
    of_torch = ValueError("Error(s) in loading:\n\tMissing key: w\nmore")
    assert first_line(of_torch) == "Error(s) in loading: Missing key: w"
    assert first_line(ValueError("a\nb")) == "a" and first_line(ValueError("a:")) == "a:"
    assert first_line(ValueError("")) == "ValueError"


def test_a_path_expands_the_home_folder_and_refuses_what_is_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert a_path("~/runs/new") == tmp_path / "runs" / "new"
    parser = Parser()
    add_data(parser.add_argument)
    args = parser.parse_args(["--data=~/x", "--caption-key", "text"])  # a shell does not expand "~" after "="
    assert (args.data, args.caption_key) == (f"{tmp_path}/x", "text")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(argparse.ArgumentTypeError):
        a_path(str(tmp_path / "pipe"))


def test_numbers_that_are_not_positive_too_large_or_not_finite_are_refused():
    for text in ("0", "-1", "9" * 25, "1.5"):
        with pytest.raises(argparse.ArgumentTypeError):
            positive_int(text)
    for text in ("nan", "inf", "-1e400", "half", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="not a finite number"):
            finite_number(text)


def test_signals_that_a_system_lacks_are_left_out(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")  # as on Windows
    assert signals("SIGTERM", "SIGUSR1") == [signal.SIGTERM]


@pytest.mark.parametrize("text", ["", " ", os.fsdecode(b"caf\xe9")])
@pytest.mark.parametrize("option", ["--clip", "--data", "--caption-key", "--out", "prompt"])
def test_an_empty_value_is_refused_and_not_taken_as_the_default(capsys, option, text):
    parser = Parser()
    add_data(parser.add_argument)
    parser.add_argument("--clip", default="emoji")
    parser.add_argument("--out", type=a_path)
    parser.add_argument("prompt", nargs="*")
    with pytest.raises(SystemExit):
        parser.parse_args([option, text] if option[0] == "-" else [text])
    said = capsys.readouterr().err.splitlines()[-1]
    assert (f"{option}: it " in said and "leave it out" in said) or "rename the file" in said
