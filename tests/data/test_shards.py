"""Shards: every sample is reached, held-out ones never, and what cannot be read is told by its true cause."""

import gzip
import io
import itertools
import json
import tarfile
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image, features

from common.cli import UserError
from data import members, shards, sources
from data.batches import is_held_out
from data.pairs import DUPLICATE, EMPTY, FIELD, NO_CAPTION, NO_IMAGE, SHARD
from tests.data.test_sources import COLORS, color_of, good, jpeg

PICTURE = jpeg((9, 9, 9), size=(16, 16))


def write_tar(path, files, mode="w"):
    """files: (name, bytes) in the order in which they come."""
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def named(samples):
    """{suffix: bytes} of samples → files, key by key."""
    return [(f"{i:06d}.{suffix}", content) for i, parts in enumerate(samples) for suffix, content in parts.items()]


def numbered(count, first=0):
    """Tiny samples whose caption is their number."""
    return [{"jpg": b"x", "txt": str(i).encode()} for i in range(first, first + count)]


@pytest.fixture
def undecoded(monkeypatch):
    """Images are not looked at."""
    nothing = torch.zeros(3, 1, 1)
    monkeypatch.setattr("data.pairs.read_image", lambda file, resolution: nothing)


def seen(source, steps, batch, rank=0, world_size=1, worker=0, workers=1):
    made = source.batches(range(worker, 2**62, workers), batch, rank, world_size)
    return [caption for b in itertools.islice(made, steps) for caption in b.captions]


# ----------------------------------------------------------------------------------------------------------------------
# Coverage.


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_every_sample_of_a_shard_is_reached_about_equally_often(tmp_path, undecoded, kind):
    """Of 10,000, by one of 8 workers of one of 64 ranks with small parts, from what many blocks give at their start."""
    path = write_tar(tmp_path / f"0.{kind}", named(numbered(10_000)), "w:gz" if kind == "tar.gz" else "w")
    source = sources.open_data(path, 16, seed=0)
    source.holds_out = False
    counts = Counter()
    for rank in range(24 if kind == "tar" else 8):
        counts.update(int(caption) // 1000 for caption in seen(source, 25, 4, rank, 64, worker=3, workers=8))
    shares = np.array([counts[tenth] for tenth in range(10)]) / counts.total()
    if kind == "tar":  # 24 starts; a start reaches some hundred samples
        assert shares.min() > 0.01 and shares.max() < 0.3
    else:
        assert np.count_nonzero(shares) >= 5


def test_a_whole_block_sees_nearly_every_sample_once(tmp_path, undecoded):
    path = write_tar(tmp_path / "0.tar", named(numbered(1000)))
    source = sources.open_data(path, 16, seed=0)
    source.holds_out = False
    counts = Counter(map(int, seen(source, 1250, 8)))  # 10,000 samples: ten rounds
    assert len(counts) == 1000 and max(counts.values()) <= 13 and min(counts.values()) >= 6


def test_ranks_and_workers_read_from_places_of_their_own(tmp_path, undecoded, monkeypatch):
    """Not the same samples in another order."""
    monkeypatch.setattr(shards, "BUFFER", 1)
    source = sources.open_data(write_tar(tmp_path / "0.tar", named(numbered(1000))), 16, seed=0)
    starts = {seen(source, 1, 4, rank, 2, worker, 2)[0] for rank in range(2) for worker in range(2)}
    assert len(starts) == 4


def test_a_sample_comes_as_often_as_its_weight_says(tmp_path, undecoded):
    samples = numbered(400)
    for i, parts in enumerate(samples):
        parts["json"] = json.dumps({"weight": 0.25} if i % 2 else {}).encode()
    source = sources.open_data(write_tar(tmp_path / "0.tar", named(samples)), 16, seed=0)
    captions = seen(source, 500, 4)
    assert sum(int(caption) % 2 for caption in captions) / len(captions) == pytest.approx(0.2, abs=0.03)


def test_commands_reach_every_sample_as_well(tmp_path, undecoded, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 1000)
    write_tar(tmp_path / "0.tar", named(numbered(900)))
    source = sources.open_data(f"pipe:cat {tmp_path}/0.tar", 16, seed=0)
    source.holds_out = False
    tenths = Counter(int(c) // 90 for rank in range(30) for c in seen(source, 10, 4, rank, 64))
    assert len(tenths) == 10 and max(tenths.values()) < 0.3 * tenths.total()


@pytest.mark.parametrize("start", [0.0, 0.1, 0.31, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_read_from_anywhere_gives_each_file_once(tmp_path, start, form):
    """Long names need a header of their own, which a start may miss."""
    with tarfile.open(tmp_path / "0.tar", "w", format=form) as tar:
        for i in range(40):
            stem = f"{'folder-' * 8}{i}/{'name-' * 12}{i}" if form != tarfile.USTAR_FORMAT else f"{i}"
            for suffix in (".jpg", ".txt"):
                info = tarfile.TarInfo(stem + suffix)
                info.size = 100 + 50 * i
                tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
    whole = list(members.members(str(tmp_path / "0.tar")))
    turned = list(members.members(str(tmp_path / "0.tar"), start))
    assert len(whole) == 80 and sorted(map(tuple, turned)) == sorted(map(tuple, whole))


def test_a_resumed_stream_decodes_nothing_of_what_came_before(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "0.tar", named(numbered(300)))
    monkeypatch.setattr("data.pairs.read_image", lambda file, resolution: torch.zeros(3, 1, 1))
    source = sources.open_data(path, 16, seed=0)
    whole = seen(source, 60, 4)
    decoded = []
    monkeypatch.setattr("data.pairs.read_image", lambda *_: decoded.append(1) or torch.zeros(3, 1, 1))
    (batch,) = itertools.islice(source.batches(range(59, 2**62), 4, 0, 1), 1)
    assert batch.captions == whole[-4:] and len(decoded) == 4


def test_a_resumed_stream_with_broken_samples_is_exact(tmp_path):
    samples = [{"jpg": b"broken" if i % 4 == 0 else PICTURE, "txt": str(i).encode()} for i in range(120)]
    source = sources.open_data(write_tar(tmp_path / "0.tar", named(samples)), 16, seed=0)
    whole = seen(source, 12, 4)
    for first in (1, 5, 11):
        rest = itertools.islice(source.batches(range(first, 2**62), 4, 0, 1), 12 - first)
        assert [caption for batch in rest for caption in batch.captions] == whole[4 * first :]


# ----------------------------------------------------------------------------------------------------------------------
# What is held out.


def open_as(kind, path, files):
    """Files of a name and content each, as a folder or as a shard."""
    if kind == "shards":
        return sources.open_data(write_tar(path / "0.tar", files), 16, seed=0)
    for name, content in files:
        (path / name).write_bytes(content)
    return sources.open_data(str(path), 16, seed=0)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_training_never_sees_the_held_out_pairs(tmp_path, undecoded, kind):
    source = open_as(kind, tmp_path, named(numbered(1000)))
    held_out = {caption for batch in source.evaluation(held_out=True) for caption in batch.captions}
    others = {caption for batch in source.evaluation() for caption in batch.captions}
    assert 8 <= len(held_out) <= 40 and len(held_out | others) == 1000 and not held_out & others
    assert held_out == {str(i) for i in range(1000) if is_held_out(f"{i:06d}")}  # of the name alone
    assert set(seen(source, 300, 8)) <= others and source.holds_out
    first = next(source.evaluation_pairs(1000))
    assert set(first.captions) == held_out
    everything = [caption for batch in source.evaluation_pairs(64) for caption in batch.captions]
    assert len(everything) == 1000
    assert any("held out" in line for line in source.describe())


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_of_few_pairs_none_is_held_out_and_that_is_said(tmp_path, undecoded, kind):
    source = open_as(kind, tmp_path, named(numbered(199)))
    assert not source.holds_out and list(source.evaluation(held_out=True)) == []
    assert sum(len(batch.captions) for batch in source.evaluation_pairs()) == 199
    assert any(line.startswith("None is held out") for line in source.describe())


def test_where_the_json_names_the_held_out_pairs_it_decides_alone(tmp_path, undecoded):
    samples = numbered(600)
    for i, parts in enumerate(samples):
        parts["json"] = json.dumps({"held_out": "tone" if i % 100 == 7 else None}).encode()
    source = sources.open_data(write_tar(tmp_path / "0.tar", named(samples)), 16, seed=0)
    (batch,) = source.evaluation(600, held_out=True)
    assert sorted(map(int, batch.captions)) == [7, 107, 207, 307, 407, 507]
    assert not set(batch.captions) & set(seen(source, 200, 8))


def test_the_emoji_hold_out_what_they_name(undecoded):
    source = sources.open_data("emoji", 16, seed=0)
    assert source.names_held_out
    assert sum(len(batch.captions) for batch in source.evaluation(512, held_out=True)) == 214


# ----------------------------------------------------------------------------------------------------------------------
# Captions and names.


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_several_lines_are_several_captions_of_which_each_use_draws_one(tmp_path, kind):
    files = named([{"jpg": PICTURE, "txt": f"{i} a\n{i} b\n\n{i} c\n".encode()} for i in range(8)])
    if kind == "folder":
        for name, content in files:
            (tmp_path / name).write_bytes(content)
        source = sources.open_data(str(tmp_path), 16, seed=0)
    else:
        source = sources.open_data(write_tar(tmp_path / "0.tar", files), 16, seed=0)
    assert sorted(lines for _, lines in source.examples()) == [[f"{i} a", f"{i} b", f"{i} c"] for i in range(8)]
    counts = Counter(seen(source, 60, 8))
    assert len(counts) == 24 and max(counts.values()) < 3 * min(counts.values())


def all_captions(source):
    return sorted(caption for batch in source.evaluation() for caption in batch.captions)


def test_names_with_periods_and_folders(tmp_path):
    stems = [f"IMG 2.{i}" for i in range(5)] + ["a.b/c.d.e", "v1.0/v1.0", "trailing."]
    files = [
        (f"{stem}{suffix}", content)
        for stem in stems
        for suffix, content in ((".jpg", PICTURE), (".txt", stem.encode()))
    ]
    source = sources.open_data(write_tar(tmp_path / "0.tar", files), 16, seed=0)
    assert all_captions(source) == sorted(stems)


def test_files_of_a_sample_that_lie_apart(tmp_path):
    """First all images, then all captions."""
    files = [(f"{i}.jpg", jpeg(COLORS[i % 6])) for i in range(8)] + [(f"{i}.txt", str(i).encode()) for i in range(8)]
    source = sources.open_data(write_tar(tmp_path / "0.tar", files), 16, seed=0)
    (batch,) = source.evaluation()
    assert sorted(batch.captions) == [str(i) for i in range(8)] and not batch.skipped
    for image, caption in zip(batch.images, batch.captions, strict=True):
        assert color_of(image) == COLORS[int(caption) % 6]
    assert set(seen(source, 20, 4)) == {str(i) for i in range(8)}


def encoded(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 200, 9)).save(buffer, kind)
    return buffer.getvalue()


KINDS = [("jpg", "JPEG"), ("JPG", "JPEG"), ("jpeg", "JPEG"), ("jfif", "JPEG"), ("webp", "WEBP"), ("PNG", "PNG")]
KINDS += [("bmp", "BMP"), ("gif", "GIF"), ("tif", "TIFF"), ("TIFF", "TIFF")]
KINDS += [("avif", "AVIF")] if features.check("avif") else []


@pytest.mark.parametrize("place", ["folder", "shards"])
@pytest.mark.parametrize("caption", ["txt", "TXT", "Txt"])
def test_images_of_every_kind_are_read_whatever_the_case(tmp_path, place, caption):
    files = []
    for i, (suffix, kind) in enumerate(KINDS):
        files += [(f"{i}.{suffix}", encoded(kind)), (f"{i}.{caption}", str(i).encode())]
    if place == "folder":
        for name, content in files:
            (tmp_path / name).write_bytes(content)
    source = sources.open_data(str(tmp_path) if place == "folder" else write_tar(tmp_path / "0.tar", files), 16, seed=0)
    (batch,) = source.evaluation()
    assert sorted(map(int, batch.captions)) == list(range(len(KINDS))) and not batch.skipped
    assert all(color_of(image) == (0, 255, 0) for image in batch.images)


@pytest.mark.parametrize("place", ["folder", "shards"])
def test_captions_in_a_field_of_the_json(tmp_path, place):
    facts = [{"prompt": "one\ntwo"}, {"prompt": ["three", "four"]}, {"prompt": "five"}, {"prompt": "six", "url": "x"}]
    bad = [{"text": "no field"}, {"prompt": None}, {"prompt": 7}, {"prompt": []}, {"prompt": " "}, ["prompt"]]
    files = named([{"jpg": PICTURE, "json": json.dumps(each).encode()} for each in facts + bad])
    files += [("broken.jpg", PICTURE), ("broken.json", b"{"), ("deep.jpg", PICTURE), ("deep.json", b"[" * 100_000)]
    if place == "folder":
        for name, content in files:
            (tmp_path / name).write_bytes(content)
    spec = str(tmp_path) if place == "folder" else write_tar(tmp_path / "0.tar", files)
    source = sources.open_data(spec, 16, seed=0, caption_key="prompt")
    assert sorted(lines for _, lines in source.examples()) == [["five"], ["one", "two"], ["six"], ["three", "four"]]
    assert source.tally.take() == {FIELD: 7, EMPTY: 1}
    with pytest.raises(UserError, match=r"prompt, url|prompt.*--caption-key|no field|text"):
        sources.open_data(spec, 16, seed=0)
    with pytest.raises(UserError, match=r"prompt"):
        next(sources.open_data(spec, 16, seed=0, caption_key="caption").examples())


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be read.


def test_true_causes_in_a_shard(tmp_path):
    files = named([good(i) for i in range(6)])
    files += [("alone.jpg", PICTURE), ("alone2.txt", b"text"), ("empty.jpg", PICTURE), ("empty.txt", b"")]
    files += [("twice.jpg", PICTURE), ("twice.JPG", PICTURE), ("twice.txt", b"x"), ("x.npy", b"1"), ("._0.jpg", b"mac")]
    source = sources.open_data(write_tar(tmp_path / "0.tar", files), 16, seed=0)
    (batch,) = source.evaluation()
    assert batch.skipped == {NO_CAPTION: 1, NO_IMAGE: 1, EMPTY: 1, DUPLICATE: 1} and len(batch.captions) == 7
    assert any("Not read: .npy" in line for line in source.describe())


@pytest.mark.parametrize("start", [0.0, 0.9])
def test_of_a_shard_cut_short_all_before_the_cut_is_read_from_anywhere(tmp_path, start):
    write_tar(tmp_path / "0.tar", named(numbered(100)))
    content = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content[: 512 * 4 * 70 + 512 + 100])
    found = []
    with pytest.raises(tarfile.TarError):
        found += [member for member in members.members(str(tmp_path / "0.tar"), 0.0)]
    with pytest.raises(tarfile.TarError):
        for member in members.members(str(tmp_path / "0.tar"), start):
            found.append(tuple(member))
    assert len(set(found)) in (140, 141)


def test_a_broken_header_in_the_middle_is_no_end(tmp_path):
    write_tar(tmp_path / "0.tar", named([good(i) for i in range(20)]))
    with tarfile.open(tmp_path / "0.tar") as tar:
        offset = tar.getmembers()[21].offset
    content = bytearray((tmp_path / "0.tar").read_bytes())
    content[offset : offset + 512] = b"garbage!" * 64
    (tmp_path / "0.tar").write_bytes(content)
    source = sources.open_data(str(tmp_path / "0.tar"), 16, seed=0)
    (batch,) = source.evaluation()
    assert batch.skipped[SHARD] == 1 and "no header at byte" in source.tally.first[SHARD]
    assert len(set(seen(source, 40, 4))) > 15  # what comes after it is found from behind


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("pipe:no-such-command {0..1}", "not found"),
        ("pipe:echo 'no rights' >&2; exit 3", "no rights (exit status 3)"),
        ("pipe:true", "empty"),
        ("pipe:cat /dev/null", "empty"),
        ("pipe:yes", "not "),
        ("http://127.0.0.1:9/{0..3}.tar", "127.0.0.1"),
        ("https://127.0.0.1:9/0.tar.gz", "127.0.0.1"),
    ],
)
def test_the_first_error_of_a_reader_reaches_the_user(spec, says):
    with pytest.raises(UserError) as caught:
        sources.open_data(spec, 16, seed=0)
    assert says in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("spec", ["s3://bucket/0.tar", "gs://bucket/{0..3}.tar"])
def test_a_command_that_is_not_installed_is_named(spec, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"there is no command (aws|gcloud) here"):
        sources.open_data(spec, 16, seed=0)


def test_a_command_that_is_silent_is_given_up(monkeypatch):
    monkeypatch.setattr(members, "READ_TIMEOUT", 0.2)
    with pytest.raises(UserError, match=r"nothing came for 0.2 s"):
        sources.open_data("pipe:sleep 30; true", 16, seed=0)


def test_shards_behind_a_web_server(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 20)
    write_tar(tmp_path / "0.tar", named([good(i) for i in range(12)]))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        source = sources.open_data(f"{url}/0.tar", 16, seed=0)
        assert len(all_captions(source)) == 12 and len(seen(source, 2, 4)) == 8
        with pytest.raises(UserError, match="404"):
            sources.open_data(f"{url}/1.tar", 16, seed=0)
    finally:
        server.shutdown()
        server.server_close()


BAD = {
    "empty": lambda path: path.write_bytes(b""),
    "a byte": lambda path: path.write_bytes(b"x"),
    "zeros": lambda path: path.write_bytes(bytes(10_240)),
    "text": lambda path: path.write_text("not a tar\n" * 200),
    "a cut gzip": lambda path: path.write_bytes(gzip.compress(b"x" * 5000)[:40]),
    "a gzip of text": lambda path: path.write_bytes(gzip.compress(b"not a tar" * 500)),
    "a gzip's first bytes": lambda path: path.write_bytes(b"\x1f\x8b"),
    "an image": lambda path: path.write_bytes(PICTURE),
    "a web page": lambda path: path.write_text("<!DOCTYPE html><html>not found</html>"),
    "no files": lambda path: write_tar(path, []),
    "other files": lambda path: write_tar(path, [("a.npy", b"1"), ("README", b"text"), (".txt", b"hidden")]),
    "captions alone": lambda path: write_tar(path, [("a.txt", b"1"), ("b.txt", b"2")]),
    "images alone": lambda path: write_tar(path, [("a.jpg", PICTURE), ("b.jpg", PICTURE)]),
    "json alone": lambda path: write_tar(path, [("a.json", b"{}")]),
    "pixels too few": lambda path: write_tar(path, [("a.jpg", jpeg((1, 2, 3), size=(4, 4))), ("a.txt", b"1")]),
    "a folder": lambda path: path.mkdir(),
    "a dangling link": lambda path: path.symlink_to(path.with_name("nowhere")),
}


@pytest.mark.parametrize("content", BAD)
@pytest.mark.parametrize("name", ["0.tar", "0.tgz"])
def test_what_is_no_shard_is_one_clear_line(tmp_path, content, name):
    BAD[content](tmp_path / name)
    with pytest.raises(UserError, match=r"^--data.*0\.t") as caught:
        sources.open_data(str(tmp_path / name), 16, seed=0)
    assert len(str(caught.value).splitlines()) == 1
