"""Folders as people have them: every readable pair is read, and the source describes what it found."""

import os
import re

import pytest

from common.cli import UserError
from data import sources
from data.pairs import FILE
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
    (tmp_path / "deep" / "back").symlink_to(tmp_path)  # leads in a circle
    (tmp_path / "again").symlink_to(tmp_path / "deep" / "er")
    assert all_captions(source_of(tmp_path)) == ["0", "1", "2", "3", "deep", "periods", "umlaut", "upper"]


def test_links_that_lead_out_are_not_followed_but_reported(tmp_path):
    data, elsewhere = filled(tmp_path / "data"), filled(tmp_path / "data2", 9)
    (data / "folder").symlink_to(elsewhere)
    (data / "7.jpg").symlink_to(elsewhere / "7.jpg")
    (data / "8.jpg").write_bytes(PICTURE)
    (data / "8.txt").symlink_to("/etc/hostname")
    write_tar(elsewhere / "0.tar", named([{"jpg": PICTURE, "txt": b"x"}] * 6))
    (data / "0.tar").symlink_to(elsewhere / "0.tar")
    source = source_of(data)
    assert all_captions(source) == ["0", "1", "2", "3", "4", "5"]
    assert any(
        line.startswith("4 links lead out of the folder and are not followed, such as ") for line in source.describe()
    )
    (tmp_path / "link").symlink_to(data)  # --data itself may be a link
    assert len(all_captions(source_of(tmp_path / "link"))) == 6


def test_names_that_are_not_utf8_are_described(tmp_path):
    filled(tmp_path, 20)
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(PICTURE)
    assert r"caf\udce9.jpg" in "\n".join(source_of(tmp_path).describe())


def test_a_folder_describes_what_it_contains(tmp_path):
    filled(tmp_path, 20)
    for i in range(8):
        pair(tmp_path, f"alone{i}")
    for name in ("a.heic", "b.heic", "c.svg", "README", ".hidden.jpg", "._0.jpg", ".DS_Store", "lonely.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "odd.jpg").write_bytes(PICTURE)
    (tmp_path / "odd.txt").mkdir()
    (tmp_path / "5.TXT").write_text("a second caption")
    text = described(tmp_path)
    for part in ("20 images have a", "10 images have no caption, such as", "2 .heic", "1 no suffix"):
        assert part in text
    assert "1 captions have no image, such as " in text and "lonely.txt." in text
    assert f"1 captions belong to an image that has another, such as {tmp_path / '5.TXT'}." in text
    assert (
        f"1 images have names that begin with a period, and are not read, such as {tmp_path / '.hidden.jpg'}." in text
    )
    assert "None is held out for evaluation" in text


def test_captions_in_json_are_suggested(tmp_path):
    for i in range(5):
        pair(tmp_path, str(i), '{"caption": "a cat", "url": "x"}' if i else "damaged", text=".json")
    with pytest.raises(UserError, match=r"The .json files have the fields caption, url; .*--caption-key"):
        source_of(tmp_path)
    assert "5 images have a caption in the field" in described(tmp_path, caption_key="caption")


def test_names_that_only_begin_like_a_system_folder_are_read(tmp_path):
    for name in ("@eaDirector", "lost+found dog", "__MACOSX 2", "4", "5"):
        pair(tmp_path, name, name)
    assert len(all_captions(source_of(tmp_path))) == 5


def test_what_lies_beside_shards_is_described(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_tar(data / "0.tar", named([{"jpg": PICTURE, "txt": b"a"}] * 6))
    write_tar(tmp_path / "1.tar", named([{"jpg": PICTURE, "txt": b"b"}] * 6))
    (data / "1.tar").symlink_to(tmp_path / "1.tar")
    for name in ("2.tbz2", "3.tar.zst", "0_stats.json"):
        (data / name).write_bytes(b"x")
    text = described(data)
    assert f"1 links lead out of the folder and are not followed, such as {data / '1.tar'}." in text
    assert all(f"1 {kind}" in text for kind in (".tbz2", ".zst", ".json"))


def test_pairs_and_shards_in_one_folder_are_refused_but_not_images_alone(tmp_path):
    samples = named([{"jpg": PICTURE, "txt": b"other"}] * 6)
    for name in ("backup.tar", "B.TGZ"):
        data = tmp_path / name[0]
        pair(data, "cover")
        write_tar(data / name, samples, "w:gz" if name == "B.TGZ" else "w")
        assert len(all_captions(source_of(data))) == 6
        filled(data, 30)
        with pytest.raises(UserError, match=rf"30 images with captions and 1 shard\(s\), such as {name}:"):
            source_of(data)


@pytest.mark.parametrize("beside", ["nothing", "pairs", "a shard"])
def test_shards_in_subfolders_are_not_read_but_reported(tmp_path, beside):
    shard = named([{"jpg": PICTURE, "txt": b"x"}] * 6)
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        write_tar(tmp_path / part / "0.tar.xz", shard, "w:xz")
    message = f"2 shard(s) in subfolders are not read: name a pattern or their folder, such as {tmp_path / 'train'}."
    if beside == "nothing":
        with pytest.raises(UserError, match=re.escape(message)):
            source_of(tmp_path)
        return
    if beside == "pairs":
        filled(tmp_path)
    else:
        write_tar(tmp_path / "0.tar", shard)
    source = source_of(tmp_path)
    assert message in list(source.findings()) and len(all_captions(source)) == 6


def test_only_exact_suffixes_are_shards_and_braces_and_brackets_may_be_in_real_names(tmp_path):
    folder = filled(tmp_path / "a{1}[x]*")
    for name in ("notes.tar.txt", "old.tarball", "0.tar.part", ".0.tar", "0_stats.tar.json"):
        (folder / name).write_bytes(b"no shard")
    (tmp_path / "b{2}").mkdir()
    shard = write_tar(tmp_path / "b{2}" / "x{7}.tar", named([{"jpg": PICTURE, "txt": b"x"}] * 6))
    for path in (folder, tmp_path / "b{2}", shard):
        assert len(all_captions(source_of(path))) == 6
    assert sources.expand_shards(r"pipe:cat a\ {0..1}.tar") == [r"pipe:cat a\ 0.tar", r"pipe:cat a\ 1.tar"]


def test_a_pipe_among_the_files_is_skipped(tmp_path):
    """Its other end might never write."""
    filled(tmp_path)
    (tmp_path / "0.jpg").unlink()
    os.mkfifo(tmp_path / "0.jpg")
    batch = next(source_of(tmp_path).evaluation())
    assert batch.skipped == {FILE: 1} and sorted(batch.captions) == ["1", "2", "3", "4", "5"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_and_folders_are_reported(tmp_path):
    filled(tmp_path)
    (tmp_path / "0.jpg").chmod(0)
    source = source_of(tmp_path)
    assert next(source.evaluation()).skipped == {FILE: 1}
    tmp_path.chmod(0)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        source_of(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes.

BAD = {
    "nothing": lambda data: data.mkdir(),
    "three pairs": lambda data: filled(data, 3),
    "captions alone": lambda data: [data.mkdir(), (data / "a.txt").write_text("x")],
    "images alone": lambda data: [pair(data, str(i)) for i in range(5)],
    "captions named as the images": lambda data: [pair(data, str(i), "x", text=".jpg.txt") for i in range(5)],
    "captions with spaces": lambda data: [pair(data, str(i), "x", text=" .txt") for i in range(5)],
    "folders named as images": lambda data: [(data / f"{i}.jpg").mkdir(parents=True) for i in range(5)],
    "a circle of links": lambda data: [data.mkdir(), (data / "x").symlink_to(data)],
    "dangling links": lambda data: [data.mkdir(), *((data / f"{i}.jpg").symlink_to("nowhere") for i in range(5))],
    "hidden pairs": lambda data: [pair(data, f".{i}", "x") for i in range(5)],
    "resource forks": lambda data: [pair(data / "__MACOSX", str(i), "x") for i in range(5)],
    "an archive of another kind": lambda data: [data.mkdir(), (data / "data.zip").write_bytes(b"PK")],
    "a file": lambda data: data.write_text("x"),
    "a dangling link": lambda data: data.symlink_to("nowhere"),
    "a pipe": lambda data: os.mkfifo(data),
}


@pytest.mark.parametrize("content", BAD)
def test_what_is_no_folder_of_pairs_is_one_clear_line(tmp_path, content):
    BAD[content](tmp_path / "data")
    with pytest.raises(UserError, match=r"^--data .*data") as caught:
        source_of(tmp_path / "data")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "spec",
    ["", " ", "x" * 5000, "a\0b", "~/nowhere", "emoji ", "{0..3}.tar", "{3..0.tar", "*.tar", "file:///nowhere.tar"],
)
def test_what_names_no_data_is_one_clear_line(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--data") as caught:
        source_of(spec)
    assert len(str(caught.value).splitlines()) == 1
