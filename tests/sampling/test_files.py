"""Pictures that say how they were made, and folders of thousands."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

import sample
from common.cli import MADE_BY, UserError
from sampling import files
from tests.conftest import assert_one_line
from weights.generator_file import DEMO, content, load_generator, save_generator


@pytest.fixture
def each(run_main, tmp_path):
    """sample.py --each with arguments → exit status, stdout, stderr."""
    return lambda *arguments: run_main(sample.main, *arguments, "--device", "cpu", "--each", tmp_path / "all")


def test_a_folder_says_how_each_picture_was_made_and_is_completed_with_the_same(each, tmp_path, monkeypatch):
    monkeypatch.setattr(files.latent, "BATCH", 4)
    options = "--num", 5, "--seed", 5, "--truncation", 0.5, "--resolution", 64
    arguments, folder = ("red heart", "пингвин 🐧", *options), tmp_path / "all"
    status, stdout, stderr = each(*arguments)
    assert status == 0 and "10 new pictures, 10 in all" in stdout, stderr
    listed = [json.loads(line) for line in (folder / files.INDEX).read_text(encoding="utf-8").splitlines()]
    assert [(row["prompt"], row["number"]) for row in listed][5:] == [("пингвин 🐧", n) for n in range(5)]
    assert json.loads(Image.open(folder / "000004.png").text[MADE_BY]) == listed[4]
    assert listed[4]["seed"] == 5 and listed[4]["psi"] == 0.5
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(whole) == [*(row["file"] for row in listed), files.INDEX]
    times = {name: (folder / name).stat().st_mtime_ns for name in whole}
    for name in ("000003.png", "000009.png"):
        (folder / name).unlink()
    (folder / ".000003.png.123.unfinished").touch()  # killed within a picture
    assert "2 new pictures, 10 in all" in each(*arguments)[1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert all((folder / f"{i:06d}.png").stat().st_mtime_ns == times[f"{i:06d}.png"] for i in (0, 1, 2, 4, 5))


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_only_a_picture_of_ours_is_replaced(run_main, tmp_path, name):
    """Not one that another program wrote over ours."""
    arguments = ("red heart", "--num", 1, "--resolution", 64, "--device", "cpu", "--out", tmp_path / name)
    assert [run_main(sample.main, *arguments)[0] for _ in range(2)] == [0, 0]
    if name == "a.png":
        about = json.loads(Image.open(tmp_path / name).text[MADE_BY])
        assert about["command"].startswith("sample.py 'red heart' --num 1")
    Image.open(tmp_path / name).convert("L").save(tmp_path / name, comment=b"northern lights, aurora\0")
    before = (tmp_path / name).read_bytes()
    says = "exists, and this command did not make it; give another --out"
    assert_one_line(run_main(sample.main, *arguments), says)
    assert (tmp_path / name).read_bytes() == before


def test_a_picture_that_is_too_large_for_its_format_is_a_users_mistake(tmp_path):
    wide = Image.new("RGB", (70_000, 1))
    for name in ("a.jpg", "a.gif"):
        with pytest.raises(UserError, match="cannot be written at 70000×1"):
            files.save([wide], tmp_path / name, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_command_or_model_is_refused_and_left_alone(each, tmp_path):
    small = "--num", 2, "--resolution", 64  # without the second stage
    assert each("red heart", *small)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "all").iterdir()}
    other = tmp_path / DEMO.name
    generator, clip, _ = load_generator(DEMO)
    generator.w_avg += 1
    save_generator(other, *content(generator, SimpleNamespace(text=clip, name=""), 64, {}))
    for arguments in (("whale", *small), ("red heart", *small, "--checkpoint", other)):
        assert_one_line(each(*arguments), "pictures of another command or model")
    (tmp_path / "all" / files.INDEX).unlink()  # now the pictures may be the user's
    assert each("red heart", *small)[0] == 2
    del before[files.INDEX]
    assert {path.name: path.read_bytes() for path in (tmp_path / "all").iterdir()} == before
