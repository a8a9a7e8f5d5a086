"""What every source keeps, and the processes that load them: order, resume, stopping, and what fails on the way."""

import io
import itertools
import json
import os
import signal
import tarfile
import threading
import time
from collections import Counter

import pytest
import torch
from PIL import Image

from common import stopping
from common.cli import UserError
from data import shards, sources
from data.pairs import EMPTY, ENCODING, FILE, IMAGE, NO_CAPTION, NO_IMAGE, SHARD
from data.sources import Skips
from tests.figures import Figures


def jpeg(color, size=(48, 36), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]


def good(i):
    return {"jpg": jpeg(COLORS[i % 6]), "txt": f"picture {i}".encode()}


def write_folder(folder, samples):
    folder.mkdir(exist_ok=True)
    for i, files in enumerate(samples):
        for suffix, content in files.items():
            (folder / f"{i}.{suffix}").write_bytes(content)
    return folder


def write_shard(path, samples):
    """As img2dataset does: key.jpg, key.txt and key.json beside each other, and a statistics file by the shard."""
    with tarfile.open(path, "w") as tar:
        for i, files in enumerate(samples):
            for suffix, content in {**files, "json": json.dumps({"key": i, "status": "success"}).encode()}.items():
                info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    path.with_name(path.stem + "_stats.json").write_text(json.dumps({"successes": len(samples)}))


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path, map(good, range(6)))


def opened(path):
    return sources.open_data(str(path), 16, seed=0)


def take(source, count, first=0, **share):
    share = {"batch": 4, "rank": 0, "world_size": 1} | share
    return list(itertools.islice(source.batches(range(first, 2**62), **share), count))


def loaded(source, count, first=0, workers=1):
    return list(itertools.islice(sources.loader(source, first, 4, workers), count))


def captions_of(batches):
    return [caption for batch in batches for caption in batch.captions]


def color_of(image):
    return tuple(int(v > 0) * 255 for v in image.mean((1, 2)))


def test_a_folder_gives_pairs_that_belong_together(folder):
    batch, next_epoch = take(opened(folder), 2, batch=6)
    assert batch.captions != next_epoch.captions and sorted(batch.captions) == sorted(next_epoch.captions)
    assert batch.images.shape == (6, 3, 16, 16) and batch.images.min() >= -1 and batch.images.max() <= 1
    assert sorted(batch.captions) == [f"picture {i}" for i in range(6)]  # an epoch holds each once
    for image, caption in zip(batch.images, batch.captions, strict=True):
        assert color_of(image) == COLORS[int(caption[-1])]


def test_shards_as_img2dataset_writes_them(tmp_path):
    for shard in range(2):
        write_shard(tmp_path / f"{shard:05d}.tar", [good(6 * shard + i) for i in range(6)])
    for spec in (tmp_path, tmp_path / "{00000..00001}.tar", tmp_path / "00000.tar"):
        batches = take(opened(spec), 4)
        assert len(set(captions_of(batches))) > 4
        for batch in batches:
            for image, caption in zip(batch.images, batch.captions, strict=True):
                assert image.shape == (3, 16, 16) and color_of(image) == COLORS[int(caption.split()[1]) % 6]
        assert captions_of(take(opened(spec), 4)) == captions_of(batches)  # the same start, the same stream
    assert captions_of(take(opened(spec), 4, rank=1, world_size=2)) != captions_of(batches)


def test_ranks_share_the_global_batch_and_any_step_can_be_the_first(folder):
    source = opened(folder)
    whole = take(source, 3)
    shares = [take(source, 3, batch=2, rank=rank, world_size=2) for rank in range(2)]
    for step in range(3):
        assert whole[step].captions == shares[0][step].captions + shares[1][step].captions
    (later,) = take(source, 1, first=2)
    assert later.captions == whole[2].captions and torch.equal(later.images, whole[2].images)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_stream_goes_on_where_it_was(tmp_path, monkeypatch, kind):
    """Within a block of a shard's stream and across blocks; a folder's also with another number of workers."""
    monkeypatch.setattr(shards, "BLOCK", 20)
    monkeypatch.setattr(shards, "BUFFER", 16)
    for part in range(3):
        samples = [good(40 * part + i) for i in range(40)]
        if kind == "shards":
            write_shard(tmp_path / f"{part}.tar", samples)
        else:
            write_folder(tmp_path / str(part), samples)
    source = opened(tmp_path)
    for workers in (0, 2):
        if workers == 0 or kind == "shards":
            whole = captions_of(loaded(source, 12, workers=workers))
        assert len(set(whole)) > 24  # of 48, drawn from 120
        for first in (1, 5, 7):
            assert captions_of(loaded(source, 12 - first, first, workers)) == whole[4 * first :]


# ----------------------------------------------------------------------------------------------------------------------
# What is broken.


def test_broken_images_and_captions_are_skipped_counted_and_told_with_their_names(folder, capsys):
    (folder / "0.jpg").write_bytes(b"<html>not an image</html>")
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:100])
    (folder / "2.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "3.txt").write_text("  ")
    made = loaded(opened(folder), 6, workers=2)
    assert set(captions_of(made)) == {"picture 4", "picture 5"}
    skipped = sum((batch.skipped for batch in made), Counter())
    assert skipped[IMAGE] >= 2 and skipped[ENCODING] >= 1 and skipped[EMPTY] >= 1
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(told) == 3 and sum(f"{EMPTY} (first: {folder}/3.jpg)" in line for line in told) == 1


def test_broken_samples_and_a_shard_cut_short_are_skipped_and_counted(tmp_path):
    broken = [{"jpg": b"<html>", "txt": b"x"}, {"jpg": jpeg(0)}, {"txt": b"x"}, {"jpg": jpeg(0), "txt": b" "}]
    write_shard(tmp_path / "00000.tar", [good(0), *broken, good(1)])
    write_shard(tmp_path / "00001.tar", [good(i) for i in range(2, 8)])
    whole = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(whole[: len(whole) // 2 + 300])
    for batches in (list(opened(tmp_path).evaluation()), take(opened(tmp_path), 60)):
        assert {"picture 0", "picture 1", "picture 2"} <= set(captions_of(batches))
        skipped = sum((batch.skipped for batch in batches), Counter())
        assert all(skipped[cause] >= 1 for cause in (SHARD, IMAGE, NO_CAPTION, NO_IMAGE, EMPTY))


@pytest.mark.parametrize("write", [write_folder, write_shard])
def test_a_source_that_is_mostly_broken_ends_in_one_clear_line(tmp_path, write, monkeypatch):
    monkeypatch.setattr(sources, "WINDOW", 100)
    pairs = [good(i) if i % 3 == 0 else {"jpg": b"<html>", "txt": b"x"} for i in range(60)]
    write(tmp_path / ("0.tar" if write is write_shard else "folder"), pairs)
    with pytest.raises(UserError, match=r"^--data .*only \d+ of 100 pairs in a row are usable: \d+ broken images"):
        loaded(opened(tmp_path), 200, workers=int(write is write_folder))  # whose words come with a traceback
    for i in range(60):
        pairs[i]["jpg"] = b"broken"
    write(tmp_path / ("0.tar" if write is write_shard else "folder"), pairs)
    with pytest.raises(UserError, match=r"^--data.*: no.* usable.* \d+ broken images \(first: .*0"):
        loaded(opened(tmp_path), 1, workers=0)


def test_shards_that_vanish_end_in_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PAUSE", 0.01)
    monkeypatch.setattr(sources, "GIVE_UP", 0.3)
    for shard in range(4):
        write_shard(tmp_path / f"{shard:05d}.tar", [good(i) for i in range(40)])
    batches = sources.loader(opened(tmp_path), 0, 8, workers=1)
    next(batches)
    (tmp_path / "00002.tar").unlink()
    skipped = sum((next(batches).skipped for _ in range(60)), Counter())
    assert skipped[SHARD] > 0 and skipped.total() == skipped[SHARD]
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=r"^--data .*nothing could be read: .*0000\d.tar: .*No such file"):
        for _ in range(1000):
            next(batches)


def test_a_disk_that_comes_back_ends_nothing_and_one_that_does_not_ends_the_run(folder, monkeypatch):
    monkeypatch.setattr(sources, "PAUSE", 0.05)
    monkeypatch.setattr(sources, "GIVE_UP", 2)
    source, away = opened(folder), folder.with_name("away")
    folder.rename(away)
    back = threading.Timer(0.3, lambda: away.rename(folder))
    back.start()
    assert len(take(source, 1)[0].captions) == 4
    back.join()
    for path in folder.glob("*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match=r"nothing could be read: .*No such file or directory"):
        take(source, 1)
    monkeypatch.setattr(stopping, "asked", lambda: True)
    with pytest.raises(stopping.Stopped):
        loaded(source, 1, workers=0)


def test_patience_ends_after_two_minutes_however_long_a_failure_takes(monkeypatch):
    for seconds, failures in ((0, 20 + 121), (60, 4)):
        now = [0.0]
        monkeypatch.setattr("data.sources.time.monotonic", lambda now=now: now[0])
        monkeypatch.setattr("data.sources.time.sleep", lambda pause, now=now: now.__setitem__(0, now[0] + pause))
        skips, count = Skips("x"), 0
        skips.fail(FILE, "before")
        skips.failures = 0
        with pytest.raises(UserError, match=r"^--data x: for 1\d\d s nothing could be read: the first$"):
            for count in itertools.count(1):
                skips.fail(FILE, "a later one" if count > 1 else "the first")
                now[0] += seconds
        assert abs(count - failures) <= 1


# ----------------------------------------------------------------------------------------------------------------------
# Workers.


@pytest.mark.parametrize("fault", ["hangs", "is killed"])
def test_a_worker_that_fails_is_replaced_and_its_batches_made_again(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(sources, "WORKER_TIMEOUT", 3)
    source, healed = Figures(8), tmp_path / "healed"
    draw = source.draw

    def faulty(numbers, seed):
        if numbers[0] == 8 and not healed.exists():
            healed.touch()
            time.sleep(60) if fault == "hangs" else os.kill(os.getpid(), signal.SIGKILL)
        return draw(numbers, seed)

    expected = captions_of(take(source, 5))
    monkeypatch.setattr(source, "draw", faulty)
    assert captions_of(loaded(source, 5)) == expected and healed.exists()


def test_workers_that_always_fail_end_in_one_clear_line(monkeypatch):
    monkeypatch.setattr(sources, "RETRIES", 1)
    source = Figures(8)
    monkeypatch.setattr(source, "draw", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="data workers failed 2 times in a row"):
        loaded(source, 1)


def test_workers_that_are_ended_with_the_run_are_not_replaced(monkeypatch):
    """A scheduler's SIGTERM reaches them too, and ends them at once."""
    source = Figures(8)
    monkeypatch.setattr(source, "draw", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(stopping, "asked", lambda: True)
    with pytest.raises(stopping.Stopped):
        loaded(source, 1)


def test_a_run_is_stopped_while_its_data_stall(monkeypatch):
    monkeypatch.setattr(sources, "POLL", 0.1)
    source = Figures(8)
    monkeypatch.setattr(source, "draw", lambda *_: time.sleep(600))
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit) as ended, stopping.listening():
        loaded(source, 1)
    assert ended.value.code == stopping.COME_AGAIN


def test_too_little_shared_memory_is_told_at_the_first_error(monkeypatch, capsys):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </x>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(UserError, match=r"^there is too little shared memory .* --workers 0, .* --shm-size"):
        loaded(Figures(8), 1)
    assert "replaced" not in capsys.readouterr().out
