"""Folders as people have them: every readable pair is read, and the source describes what it found."""

import os

import pytest

from common.cli import UserError
from tests.data.files import PICTURE, all_captions, named, source_of, write_tar


def pair(folder, stem, caption=None, image=".jpg", text=".txt"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}{image}").write_bytes(PICTURE)
    if caption is not None:
        (folder / f"{stem}{text}").write_text(caption)


def filled(folder, count=6):
    for i in range(count):
        pair(folder, str(i), str(i))
    return folder


def described(folder, **options):
    return " ".join(source_of(folder, **options).describe())


def test_pairs_in_any_case_in_folders_and_with_periods_are_found(tmp_path):
    filled(tmp_path, 4)
    pair(tmp_path, "upper", "upper", ".JPEG", ".TXT")
    pair(tmp_path, "IMG 2.5", "periods")
    pair(tmp_path, "u\u0308")  # as a Mac writes "ü"
    (tmp_path / "\u00fc.txt").write_text("umlaut")
    pair(tmp_path / "deep" / "er", "deep", "deep")
    for name in ("@eaDirector", "__MACOSX 2"):  # which only begin like hidden ones
        pair(tmp_path / name, name, name)
    found = all_captions(source_of(tmp_path))
    assert found == ["0", "1", "2", "3", "@eaDirector", "__MACOSX 2", "deep", "periods", "umlaut", "upper"]


def test_links_are_not_followed_but_reported(tmp_path):
    data, elsewhere = filled(tmp_path / "data"), filled(tmp_path / "data2", 9)
    (data / "folder").symlink_to(elsewhere)
    (data / "circle").symlink_to(data)
    (data / "7.jpg").symlink_to(elsewhere / "7.jpg")
    (data / "8.jpg").write_bytes(PICTURE)
    (data / "8.txt").symlink_to("/etc/hostname")
    os.mkfifo(data / "9.jpg")  # its other end might never write
    source = source_of(data)
    assert all_captions(source) == ["0", "1", "2", "3", "4", "5"]
    assert any(line.startswith("5 links, or special files, are not read, such as ") for line in source.describe())
    (tmp_path / "link").symlink_to(data)  # --data itself may be a link
    assert len(all_captions(source_of(tmp_path / "link"))) == 6


def test_a_folder_describes_what_it_contains(tmp_path):
    filled(tmp_path, 20)
    for i in range(8):
        pair(tmp_path, f"alone{i}")
    for name in ("a.heic", "b.heic", "c.svg", "README", ".hidden.jpg", "._0.jpg", ".DS_Store", "lonely.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "odd.jpg").write_bytes(PICTURE)
    (tmp_path / "odd.txt").mkdir()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "0.tar").write_bytes(b"x")
    text = described(tmp_path)
    for part in ("20 images have a", "10 images have no caption, such as", "2 .heic", "1 no suffix"):
        assert part in text
    assert "1 captions have no image, such as " in text and "lonely.txt." in text
    assert f"1 shards are not read (name them in --data), such as {tmp_path / 'below' / '0.tar'}." in text
    assert "None is held out for evaluation" in text


def test_captions_in_json_are_suggested(tmp_path):
    for i in range(5):
        pair(tmp_path, str(i), '{"caption": "a cat", "url": "x"}' if i else "damaged", text=".json")
    with pytest.raises(UserError, match=r"Captions in .json files need --caption-key"):
        source_of(tmp_path)
    assert "5 images have a caption in the field" in described(tmp_path, caption_key="caption")


def test_braces_and_brackets_may_be_in_real_names_and_shards_in_a_folder_are_to_be_named(tmp_path):
    folder = filled(tmp_path / "a{1}[x]*")
    (tmp_path / "b{2}").mkdir()
    shard = write_tar(tmp_path / "b{2}" / "x{7}.tar", named([{"jpg": PICTURE, "txt": b"x"}] * 6))
    for path in (folder, shard):
        assert len(all_captions(source_of(path))) == 6
    with pytest.raises(UserError, match=r"b\{2\} contains shards: name them, such as \S*/\{00000..00041\}.tar$"):
        source_of(tmp_path / "b{2}")


BAD = {
    "nothing": lambda data: data.mkdir(),
    "three pairs": lambda data: filled(data, 3),
    "captions alone": lambda data: [data.mkdir(), (data / "a.txt").write_text("x")],
    "images alone": lambda data: [pair(data, str(i)) for i in range(5)],
    "hidden pairs": lambda data: [pair(data, f".{i}", "x") for i in range(5)],
    "a file": lambda data: data.write_text("x"),
    "a dangling link": lambda data: data.symlink_to("nowhere"),
}


@pytest.mark.parametrize("content", BAD)
def test_what_is_no_folder_of_pairs_is_one_clear_line(tmp_path, content):
    BAD[content](tmp_path / "data")
    with pytest.raises(UserError, match=r"^--data .*data") as caught:
        source_of(tmp_path / "data")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("spec", ["", "x" * 5000, "a\0b", "emoji ", "{0..3}.tar", "{3..0.tar", "*.tar", "s3://b/0.tar"])
def test_what_names_no_data_is_one_clear_line(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--data") as caught:
        source_of(spec)
    assert len(str(caught.value).splitlines()) == 1
