"""Folders as people have them: every readable pair is read, and the source describes what it found."""

import pytest

from common.cli import UserError
from tests.data.files import PICTURE, all_captions, source_of


def pair(folder, stem, caption=None, image=".jpg", text=".txt"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}{image}").write_bytes(PICTURE)
    if caption is not None:
        (folder / f"{stem}{text}").write_text(caption)


def filled(folder, count=6):
    for i in range(count):
        pair(folder, str(i), str(i))


def test_pairs_in_any_case_in_folders_and_with_periods_are_found(tmp_path):
    filled(tmp_path, 4)
    pair(tmp_path, "upper", "upper", ".JPEG", ".TXT")
    pair(tmp_path, "IMG 2.5", "periods")
    pair(tmp_path / "deep" / "er", "deep", "deep")
    pair(tmp_path / "__MACOSX", "hidden", "hidden")
    pair(tmp_path, ".hidden", "hidden")
    assert all_captions(source_of(tmp_path)) == ["0", "1", "2", "3", "deep", "periods", "upper"]


def test_a_folder_describes_what_it_contains(tmp_path):
    filled(tmp_path, 20)
    for i in range(8):
        pair(tmp_path, f"alone{i}")
    for name in ("a.heic", "b.heic", "README", ".hidden.jpg", "lonely.txt", "0.tar"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "0.jpg")
    text = " ".join(source_of(tmp_path).describe())
    for part in ("20 images have a", "8 images have no caption, such as", "2 .heic", "1 no suffix"):
        assert part in text
    assert "1 captions have no image, such as " in text and "lonely.txt." in text
    assert "1 links, or special files, are not read, such as " in text
    assert f"1 shards are not read (name them in --data), such as {tmp_path / '0.tar'}." in text
    assert "None is held out for evaluation" in text


def test_captions_in_json_are_suggested(tmp_path):
    for i in range(5):
        pair(tmp_path, str(i), '{"caption": "a cat", "url": "x"}' if i else "damaged", text=".json")
    with pytest.raises(UserError, match=r"Captions in .json files need --caption-key"):
        source_of(tmp_path)
    text = " ".join(source_of(tmp_path, caption_key="caption").describe())
    assert "5 images have a caption in the field" in text


BAD = {
    "nothing": lambda data: data.mkdir(),
    "three pairs": lambda data: filled(data, 3),
    "images alone": lambda data: [pair(data, str(i)) for i in range(5)],
    "shards": lambda data: [data.mkdir(), (data / "0.tar").write_bytes(b"x")],
    "a file": lambda data: data.write_text("x"),
}


@pytest.mark.parametrize("content", BAD)
def test_what_is_no_folder_of_pairs_is_one_clear_line(tmp_path, content):
    BAD[content](tmp_path / "data")
    with pytest.raises(UserError, match=r"^--data .*data") as caught:
        source_of(tmp_path / "data")
    assert len(str(caught.value).splitlines()) == 1
    assert ("data contains shards: name them" in str(caught.value)) == (content == "shards")


@pytest.mark.parametrize("spec", ["nowhere", "{0..3}.tar", "{3..0.tar"])
def test_what_names_no_data_is_one_clear_line(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--data") as caught:
        source_of(spec)
    assert len(str(caught.value).splitlines()) == 1
