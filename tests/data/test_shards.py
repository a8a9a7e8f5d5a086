"""Shards: every sample is reached, held-out ones never, and each failure has its true cause."""

import hashlib
import itertools
import json
import os
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch

from common.cli import UserError
from data import shards
from data.pairs import DUPLICATE, EMPTY, FIELD, FORMAT, NO_CAPTION, NO_IMAGE, SHARD
from data.sources import is_held_out
from tests.data.files import PICTURE, all_captions, good, named, numbered, opened, seen, source_of, take, write_tar


@pytest.fixture
def undecoded(monkeypatch):
    """Images are not decoded."""
    nothing = torch.zeros(3, 1, 1)
    monkeypatch.setattr("data.pairs.read_image", lambda file, resolution: nothing)


def test_every_sample_is_reached_about_equally_often(tmp_path, undecoded, monkeypatch):
    """At the start of blocks of one of 8 workers on 64 ranks."""
    monkeypatch.setattr(shards, "BUFFER", 50)
    source = opened("tar", tmp_path, named(numbered(400)))
    source.holds_out, source.number = False, 400
    drawn = []
    for rank in range(30):
        batches = source.batches(range(3, 2**62, 8), 4, rank, 64)
        drawn += [int(caption) // 80 for batch in itertools.islice(batches, 25) for caption in batch.captions]
    shares = np.bincount(drawn, minlength=5) / len(drawn)
    assert shares.min() > 0.1 and shares.max() < 0.4


def test_a_batch_mixes_shards_that_are_larger_than_the_buffer(tmp_path, undecoded, monkeypatch):
    monkeypatch.setattr(shards, "BUFFER", 40)
    for number in range(20):
        write_tar(tmp_path / f"{number:03d}.tar.gz", named(numbered(100, 100 * number)), "w:gz")
    source = source_of(tmp_path / "{000..019}.tar.gz")
    assert len({int(caption) // 100 for caption in seen(source, 1, batch=40)}) > 5


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_whole(tmp_path, form):
    files = []
    for i in range(40):
        stem = f"{'folder-' * 8}{i}/{'name-' * 12}{i}"
        files += [(stem + suffix, bytes([i, i]) * (25 * i)) for suffix in (".jpg", ".mask.png", ".txt")]
    path = write_tar(tmp_path / "0.tar", files, format=form)
    assert [(f"{key}{suffix}", content) for key, suffix, content in shards.members(path)] == files


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_training_never_sees_the_held_out_pairs_nor_copies_of_them(tmp_path, undecoded, kind):
    source = opened(kind, tmp_path, named(2 * numbered(500)))
    held_out, others = (set(all_captions(source, held_out=part)) for part in (True, False))
    assert held_out == {str(i) for i in range(500) if is_held_out(b"x%d" % i, {})}
    assert 4 <= len(held_out) <= 20 and others == {str(i) for i in range(500)} - held_out
    assert set(seen(source, 200, batch=8)) <= others
    assert set(next(source.held_out_first(2 * len(held_out))).captions) == held_out
    assert sum(len(batch.captions) for batch in source.held_out_first(64)) == 1000
    assert any("held out" in line for line in source.describe())


def test_the_hash_of_img2dataset_holds_out_the_same_picture_in_any_size():
    parts = [{"sha256": hashlib.sha256(b"%d" % i).hexdigest()} for i in range(20_000)]
    held_out = [is_held_out(b"small", p) for p in parts]
    assert held_out == [is_held_out(b"large", p) for p in parts]
    assert abs(sum(held_out) - 400) < 4 * (400 * 0.98) ** 0.5  # one pair in fifty
    assert is_held_out(b"small", {"sha256": "unknown"}) == is_held_out(b"small", {})


@pytest.mark.parametrize("count", [4, 9])
def test_each_rank_reads_shards_of_its_own(tmp_path, undecoded, monkeypatch, count):
    """Of fewer shards than ranks all ranks read all, and each decodes its share."""
    for number in range(count):
        write_tar(tmp_path / f"{number:03d}.tar", named(numbered(10, 10 * number)))
    source, read, members = source_of(tmp_path / f"{{000..{count - 1:03d}}}.tar"), [], shards.members
    monkeypatch.setattr(shards, "members", lambda url, *rest: read.append(url) or members(url, *rest))
    captions = [caption for rank in range(8) for caption in all_captions(source, rank=rank, world_size=8)]
    assert sorted(map(int, captions)) == list(range(10 * count))
    assert len(read) == (count if count >= 8 else 8 * count)


def test_several_lines_are_several_captions_of_which_each_use_draws_one(tmp_path):
    samples = [{"jpg": PICTURE + b"%d" % i, "txt": f"{i} a\n{i} b\n\n{i} c\n".encode()} for i in range(8)]
    source = opened("tar", tmp_path, named(samples))
    assert sorted(lines for _, lines in source.examples()) == [[f"{i} a", f"{i} b", f"{i} c"] for i in range(8)]
    counts = Counter(seen(source, 60, batch=8))
    assert len(counts) == 24 and max(counts.values()) < 4 * min(counts.values())


def test_names_with_periods_and_folders_are_read_and_hidden_ones_are_not(tmp_path):
    stems = [f"IMG 2.{i}" for i in range(5)] + ["a.b/c.d.e"]
    files = [(stem + kind, data) for stem in stems for kind, data in ((".JPG", PICTURE), (".Txt", stem.encode()))]
    files += [("0.jpg", PICTURE), ("0.mask.png", PICTURE), ("0.npy", b""), ("0.txt", b"a mask between")]
    hidden = [(f"__MACOSX/9{name}", content) for name, content in files]
    source = opened("tar", tmp_path, files + hidden)
    (batch,) = source.evaluation_batches()
    assert sorted(batch.captions) == sorted([*stems, "a mask between"]) and batch.skipped == {DUPLICATE: 1}
    assert any("7 .jpg, 7 .txt, 1 .npy" in line for line in source.describe())


def test_captions_in_a_field_of_the_json(tmp_path):
    facts = [{"prompt": "one\ntwo"}, {"prompt": ["three", "four"]}, {"prompt": "five"}, {"prompt": "six", "url": "x"}]
    bad = [{"text": "no field"}, {"prompt": None}, {"prompt": []}, {"prompt": " "}, ["prompt"]]
    files = named([{"jpg": PICTURE, "json": json.dumps(each).encode()} for each in facts + bad])
    files += [("broken.jpg", PICTURE), ("broken.json", b"{")]
    source = opened("tar", tmp_path, files, caption_key="prompt")
    assert sorted(lines for _, lines in source.examples()) == [["five"], ["one", "two"], ["six"], ["three", "four"]]
    assert source.skips.counts == {FIELD: 5, EMPTY: 1}
    with pytest.raises(UserError, match=r"--caption-key"):
        opened("tar", tmp_path, files)
    with pytest.raises(UserError, match=rf"{FIELD} \(first: .*0.* has prompt"):
        opened("tar", tmp_path, files[:8], caption_key="caption")


def test_true_causes_in_a_shard_that_is_cut_short(tmp_path, capsys):
    files = named([good(i) for i in range(6)])
    files += [("alone.jpg", PICTURE), ("alone2.txt", b"text"), ("empty.jpg", PICTURE), ("empty.txt", b"")]
    files += [("twice.jpg", PICTURE), ("twice.png", PICTURE), ("twice.txt", b"x")]
    files += [("x.npy", b"1"), ("page.jpg", b"<html>"), ("page.txt", b"x")]
    files += [("last.jpg", PICTURE), ("last.txt", b"lost with the next one")]
    files += [("cut.jpg", bytes(5000)), ("cut.txt", b"x")]
    shard = write_tar(tmp_path / "0.tar", files)
    os.truncate(shard, (tmp_path / "0.tar").read_bytes().index(b"cut.jpg") + 2000)
    source = source_of(shard)
    causes = dict.fromkeys((NO_CAPTION, NO_IMAGE, DUPLICATE, EMPTY, FORMAT, SHARD), 1)
    (batch,) = source.evaluation_batches()
    assert batch.skipped == causes and len(batch.captions) == 7
    notes = capsys.readouterr().out
    assert f"{EMPTY} (first: empty in " in notes and f"{NO_IMAGE} (first: alone2 in " in notes
    assert next(source.evaluation_batches()).skipped == causes
    assert not capsys.readouterr().out  # each cause is reported once
    batches = take(source, 60)
    assert sum((batch.skipped for batch in batches), Counter()).keys() == causes.keys()
    assert len({caption for batch in batches for caption in batch.captions}) >= 7


@pytest.mark.parametrize("command", ["", "pipe:cat "])
@pytest.mark.parametrize("cut", [0, 100])
def test_a_shard_cut_before_or_within_a_header_is_reported(tmp_path, capsys, command, cut):
    shard = write_tar(tmp_path / "0.tar", named([good(i) for i in range(8)]))
    os.truncate(shard, (tmp_path / "0.tar").read_bytes().index(b"000005.jpg") + cut)
    source = source_of(f"{command}{shard}")
    assert len(all_captions(source)) == 4  # the last one may lack files
    assert f"{SHARD} (first: {command}{shard}: unexpected end" in capsys.readouterr().out


def test_missing_shards_are_reported_unless_they_are_most(tmp_path, undecoded):
    for number in (0, 2, 3):
        write_tar(tmp_path / f"{number}.tar", named(numbered(10, 10 * number)))
    source = source_of(tmp_path / "{0..4}.tar")
    assert any(line.startswith("2 shard(s) do not exist, such as ") for line in source.describe())
    assert len(set(seen(source, 99))) == 30 and len(all_captions(source)) == 30
    assert list(source.evaluation_batches(held_out=True)) == []  # of fewer than 200
    with pytest.raises(UserError, match=r"no such shard: .*4.tar; write several as data/\{00000..00041\}.tar"):
        source_of(tmp_path / "{3..6}.tar")


@pytest.mark.parametrize("command", ["", "pipe:cat "])
def test_a_broken_header_or_the_end_of_a_first_tar_is_no_end(tmp_path, command):
    """Two tars in one file, as cat writes them. Only the sample with the broken header loses a file."""
    for part in range(2):
        write_tar(tmp_path / f"{part}", named([good(i) for i in range(10 * part, 10 * part + 10)]))
    content = bytearray((tmp_path / "0").read_bytes() + (tmp_path / "1").read_bytes())
    with tarfile.open(tmp_path / "0") as tar:
        offset = tar.getmembers()[7].offset
    content[offset : offset + 512] = b"garbage!" * 64
    (tmp_path / "0.tar").write_bytes(content)
    source = source_of(f"{command}{tmp_path / '0.tar'}")
    (batch,) = source.evaluation_batches()
    assert len(batch.captions) == 19 and batch.skipped == {NO_CAPTION: 1}
    assert len(set(seen(source, 40))) == 19


@pytest.mark.parametrize("field", [{"GNU.sparse.map": "a,b"}, {"size": "9" * 23}])
def test_a_damaged_field_of_a_header_ends_no_run(tmp_path, field):
    """Python's tarfile raises ValueError or OverflowError, not its own TarError."""
    write_tar(tmp_path / "0.tar", named([good(i) for i in range(9)]))
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        info = tarfile.TarInfo("9.txt")
        info.pax_headers = field
        tar.addfile(info)
    source = source_of(f"{tmp_path}/{{0..1}}.tar")
    (batch,) = source.evaluation_batches()
    assert len(batch.captions) == 9 and batch.skipped == {SHARD: 1}


def test_the_error_of_a_command_reaches_the_user():
    with pytest.raises(UserError, match="no rights") as caught:
        source_of("pipe:echo 'no rights' >&2; exit 3")
    assert len(str(caught.value).splitlines()) == 1


HELD_OUT = next(picture for i in itertools.count() if is_held_out(picture := PICTURE + b"%d" % i, {}))
BAD = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<!DOCTYPE html><html>not found</html>\n" * 50),
    "other files": lambda path: write_tar(path, [("a.npy", b"1"), ("README", b"text")]),
    "images alone": lambda path: write_tar(path, [("a.jpg", PICTURE), ("b.jpg", PICTURE)]),
    # Training would look for a pair without an end.
    "all held out": lambda path: write_tar(path, named([{"jpg": HELD_OUT, "txt": b"1"}] * 250)),
}


@pytest.mark.parametrize("content", BAD)
def test_a_shard_without_pairs_to_learn_from_is_one_clear_line(tmp_path, content):
    BAD[content](tmp_path / "0.tar")
    with pytest.raises(UserError, match=r"^--data.*0\.tar") as caught:
        source_of(tmp_path / "0.tar")
    assert len(str(caught.value).splitlines()) == 1
    assert ("or all are held out" in str(caught.value)) == (content in ("other files", "all held out"))
