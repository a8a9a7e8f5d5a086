"""What the commands share."""

import errno

import pytest

from common.cli import Parser, UserError, a_path, a_truncation, add_data, errors_in_one_line, positive_int, with_fields
from presets import PRESETS


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(errno.ENOSPC, "No space", "a.png"), 2, "error: a.png could not be written: No space; make room"),
        (OSError(errno.ENOTDIR, "Not a directory", "a/b.png"), 2, "error: a/b.png: a file or a broken link is where"),
        (RuntimeError("CUDA out of memory. Tried"), 2, "error: too little memory; ask for fewer"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: too little memory; ask for fewer"),
        (UserError("--data a\nb: no such folder"), 2, "error: --data a b: no such folder\n"),  # a legal path
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_errors_of_the_user_and_of_files_and_ctrl_c_are_one_line(error, code, says, capsys):
    with pytest.raises(SystemExit) as ended, errors_in_one_line():
        raise error
    said = capsys.readouterr().err
    assert ended.value.code == code and said.startswith(says) and len(said.strip().splitlines()) == 1


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


@pytest.mark.parametrize(
    ("option", "values", "says"),
    [
        ("--num", ("0", "9" * 25, "half"), "argument --num: "),
        ("--psi", ("nan", "1e30", "half"), "argument --psi: "),
        ("--data", ("", " "), "it is empty; give a value, or leave it out"),  # and not taken as the default
        ("--caption-key", ("", " "), "it is empty; give a value, or leave it out"),
        ("--out", ("", " "), "it is empty; give a value, or leave it out"),
    ],
)
def test_unusable_values_are_refused(capsys, option, values, says):
    parser = Parser()
    add_data(parser.add_argument)
    parser.add_argument("--out", type=a_path)
    parser.add_argument("--num", type=positive_int)
    parser.add_argument("--psi", type=a_truncation)
    for value in values:
        with pytest.raises(SystemExit):
            parser.parse_args([option, value])
        assert says in capsys.readouterr().err


def test_fields_keep_their_types():
    recipe = with_fields(PRESETS["emoji"].recipe, "--set", ["lr_generator=1e-3", "batch=8", "augment=()"])
    assert recipe.lr_generator == 1e-3 and recipe.batch == 8 and recipe.augment == ()
    assert with_fields(recipe, "--set", ["r1_gamma=2"]).r1_gamma == 2.0
    assert with_fields(recipe, "--set", ["augment=('color', 'scale')"]).augment == ("color", "scale")
    phases = {4: 0, 8: 10, 16: 0, 32: 1}
    assert with_fields(recipe, "--set", [f"images_per_phase={phases}"]).images_per_phase == phases


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("speed=2", "no field here; choose one of steps, batch"),
        ("batch=2.5", "with a value like 32"),
        ("fid_every=-1", "with a value like 16000"),
        ("images_per_phase={4: 0}", "with a value like {4: 0, 8: 0, 16: 96000, 32: 256000}"),
    ],
)
def test_mistakes_say_what_to_write(assignment, says):
    with pytest.raises(UserError, match=says):
        with_fields(PRESETS["emoji"].recipe, "--set", [assignment])
