"""What the commands share."""

import errno

import pytest

from common.cli import Parser, UserError, a_path, add_data, errors_in_one_line, positive_int


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space", "a.png"), "error: a.png could not be written: No space; make room"),
        (OSError(errno.ENOTDIR, "Not a directory", "out/a.png"), "error: out/a.png: a file or a broken link is where"),
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


def test_a_path_expands_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert a_path("~/runs/new") == tmp_path / "runs" / "new"
    parser = Parser()
    add_data(parser.add_argument)
    assert parser.parse_args(["--data=~/x"]).data == f"{tmp_path}/x"  # a shell does not expand "~" after "="


@pytest.mark.parametrize("text", ["0", "9" * 25, "half"])
def test_numbers_that_are_not_positive_or_too_large_are_refused(capsys, text):
    parser = Parser()
    parser.add_argument("--num", type=positive_int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--num", text])
    assert "argument --num: " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--data", ""], ["--caption-key", " "], ["--out", ""]])
def test_an_empty_value_is_refused_and_not_taken_as_the_default(capsys, arguments):
    parser = Parser()
    add_data(parser.add_argument)
    parser.add_argument("--out", type=a_path)
    with pytest.raises(SystemExit):
        parser.parse_args(arguments)
    assert "it is empty; give a value, or leave it out" in capsys.readouterr().err
