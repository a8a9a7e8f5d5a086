"""Folders and shards as people have them, broken ones included."""

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.cli import UserError
from data import shards, sources
from data.pairs import EMPTY, ENCODING, IMAGE, NO_CAPTION, NO_IMAGE, SHARD
from tests.figures import Figures

ROOT = Path(__file__).parent.parent.parent


def jpeg(color, size=(48, 36), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


JPEG = jpeg((1, 2, 3))
COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]


@pytest.fixture
def folder(tmp_path):
    for i, color in enumerate(COLORS):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(color))
        (tmp_path / f"{i}.txt").write_text(f"picture {i}\n", encoding="utf-8")
    return tmp_path


def write_shard(path, samples):
    """As img2dataset does: key.jpg, key.txt and key.json beside each other, and a statistics file by the shard."""
    with tarfile.open(path, "w") as tar:
        for i, files in enumerate(samples):
            for suffix, content in {**files, "json": json.dumps({"key": i, "status": "success"}).encode()}.items():
                info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    path.with_name(path.stem + "_stats.json").write_text(json.dumps({"successes": len(samples)}))


def good(i):
    return {"jpg": jpeg(COLORS[i % 6]), "txt": f"picture {i}".encode()}


def take(source, count, **kwargs):
    return list(itertools.islice(source.batches(range(0, 2**62), **kwargs), count))


def color_of(image):
    return tuple(int(v > 0) * 255 for v in image.mean((1, 2)))


def test_a_folder_gives_pairs_that_belong_together(folder):
    source = sources.open_data(str(folder), 16, seed=0)
    batch, next_epoch = take(source, 2, batch=6, rank=0, world_size=1)
    assert batch.captions != next_epoch.captions and sorted(batch.captions) == sorted(next_epoch.captions)
    assert batch.images.shape == (6, 3, 16, 16) and batch.images.min() >= -1 and batch.images.max() <= 1
    assert sorted(batch.captions) == [f"picture {i}" for i in range(6)]  # an epoch holds each once
    for image, caption in zip(batch.images, batch.captions, strict=True):
        assert color_of(image) == COLORS[int(caption[-1])]


def test_ranks_share_the_global_batch_and_any_step_can_be_the_first(folder):
    source = sources.open_data(str(folder), 16, seed=3)
    whole = take(source, 3, batch=4, rank=0, world_size=1)
    shares = [take(source, 3, batch=2, rank=rank, world_size=2) for rank in range(2)]
    for step in range(3):
        assert whole[step].captions == shares[0][step].captions + shares[1][step].captions
    later = next(source.batches(range(2, 2**62), 4, 0, 1))
    assert later.captions == whole[2].captions and torch.equal(later.images, whole[2].images)


def test_workers_keep_the_order(folder):
    source = sources.open_data(str(folder), 16, seed=3)
    captions = [
        [batch.captions for batch in itertools.islice(sources.loader(source, 5, 4, workers), 4)] for workers in (0, 2)
    ]
    assert captions[0] == captions[1]


def test_broken_images_and_captions_are_skipped_counted_and_told_with_their_names(folder, capsys):
    (folder / "0.jpg").write_bytes(b"<html>not an image</html>")
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:100])
    (folder / "2.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "3.txt").write_text("  ")
    batches = sources.loader(sources.open_data(str(folder), 16, seed=0), 0, 6, workers=2)
    made = [next(batches) for _ in range(4)]
    assert all(set(batch.captions) == {"picture 4", "picture 5"} for batch in made)
    skipped = sum((batch.skipped for batch in made), Counter())
    assert skipped[IMAGE] >= 2 and skipped[ENCODING] >= 1 and skipped[EMPTY] >= 1
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(told) == 3 and sum(f"1 {EMPTY} (first: {folder}/3.jpg)" in line for line in told) == 1


def test_a_folder_of_which_nothing_can_be_read_says_so(folder):
    for path in folder.glob("*.jpg"):
        path.write_bytes(b"broken")
    with pytest.raises(
        UserError, match=r"^--data .*: none of the 6 pairs is usable: \d+ images broken \(first: .*/\d.jpg\)"
    ):
        next(sources.loader(sources.open_data(str(folder), 16, seed=0), 0, 4, workers=1))


def test_shards_as_img2dataset_writes_them(tmp_path):
    for shard in range(2):
        write_shard(tmp_path / f"{shard:05d}.tar", [good(6 * shard + i) for i in range(6)])
    for spec in (str(tmp_path), str(tmp_path / "{00000..00001}.tar"), str(tmp_path / "00000.tar")):
        source = sources.open_data(spec, 16, seed=0)
        first, second = take(source, 2, batch=5, rank=0, world_size=1)
        assert first.images.shape == (5, 3, 16, 16) and first.captions != second.captions
        for image, caption in zip(first.images, first.captions, strict=True):
            assert color_of(image) == COLORS[int(caption.split()[1]) % 6]
        again = take(source, 2, batch=5, rank=0, world_size=1)
        assert again[1].captions == second.captions  # the same start, the same stream
    other = take(sources.open_data(str(tmp_path), 16, seed=0), 4, batch=5, rank=1, world_size=2)
    assert [b.captions for b in other] != [b.captions for b in take(source, 4, batch=5, rank=0, world_size=2)]


def test_broken_samples_and_a_shard_cut_short_are_skipped_and_counted(tmp_path):
    broken = [{"jpg": b"<html>", "txt": b"x"}, {"jpg": JPEG}, {"txt": b"x"}, {"jpg": JPEG, "txt": b" "}]
    write_shard(tmp_path / "00000.tar", [good(0), *broken, good(1)])
    write_shard(tmp_path / "00001.tar", [good(i) for i in range(2, 8)])
    whole = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(whole[: len(whole) // 2 + 300])
    source = sources.open_data(str(tmp_path), 16, seed=0)
    for batches in (list(source.evaluation()), take(source, 60, batch=4, rank=0, world_size=1)):
        captions = {caption for batch in batches for caption in batch.captions}
        assert {"picture 0", "picture 1", "picture 2"} <= captions
        skipped = sum((batch.skipped for batch in batches), Counter())
        assert all(skipped[cause] >= 1 for cause in (SHARD, IMAGE, NO_CAPTION, NO_IMAGE, EMPTY))


@pytest.mark.parametrize("content", [b"", b"not a tar" * 100])
def test_shards_without_a_pair_are_one_clear_line(tmp_path, content):
    (tmp_path / "00000.tar").write_bytes(content)
    with pytest.raises(UserError, match="not one usable pair"):
        sources.open_data(str(tmp_path), 16, seed=0)
    with pytest.raises(UserError, match="braces do not match"):
        sources.open_data(str(tmp_path / "{00007.tar"), 16, seed=0)
    with pytest.raises(UserError, match="no such shard"):
        sources.open_data(str(tmp_path / "{00007..00009}.tar"), 16, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_shards_goes_on_where_it_was(tmp_path, monkeypatch, workers):
    """Within a block and across blocks, by as many workers: what the uninterrupted stream would have given."""
    monkeypatch.setattr(shards, "BLOCK", 20)
    monkeypatch.setattr(shards, "BUFFER", 16)
    for shard in range(3):
        write_shard(tmp_path / f"{shard:05d}.tar", [good(40 * shard + i) for i in range(40)])
    source = sources.open_data(str(tmp_path), 16, seed=0)

    def captions(first, count):
        batches = itertools.islice(sources.loader(source, first, 4, workers), count)
        return [caption for batch in batches for caption in batch.captions]

    whole = captions(0, 12)
    assert len(set(whole)) > 24  # of 48, drawn from 120
    for first in (1, 5, 7):
        assert captions(first, 12 - first) == whole[4 * first :]


def test_shards_that_vanish_end_in_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.PAUSES", (0.1, 0.2))
    for shard in range(4):
        write_shard(tmp_path / f"{shard:05d}.tar", [good(40 * shard + i) for i in range(40)])
    batches = sources.loader(sources.open_data(str(tmp_path), 16, seed=0), 0, 8, workers=1)
    next(batches)
    (tmp_path / "00002.tar").unlink()
    skipped = sum((next(batches).skipped for _ in range(60)), Counter())
    assert skipped[SHARD] > 0 and skipped.total() == skipped[SHARD]
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=r"^--data .*nothing could be read: .*0000\d.tar: .*No such file"):
        for _ in range(1000):
            next(batches)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_source_that_is_mostly_broken_ends_in_one_clear_line(tmp_path, kind):
    broken = {"jpg": b"<html>", "txt": b"x"}
    pairs = [good(i) if i % 3 == 0 else broken for i in range(300)]
    if kind == "shards":
        write_shard(tmp_path / "00000.tar", pairs)
    else:
        for i, pair in enumerate(pairs):
            for suffix, content in pair.items():
                (tmp_path / f"{i}.{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=r"of 1000 pairs in a row are usable: \d+ images broken"):
        for _ in itertools.islice(sources.loader(sources.open_data(str(tmp_path), 16, seed=0), 0, 8, workers=1), 200):
            pass


@pytest.mark.parametrize("fault", ["hangs", "is killed"])
def test_a_worker_that_fails_is_replaced_and_its_batches_made_again(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(sources, "WORKER_TIMEOUT", 3)
    source, healed = Figures(8), tmp_path / "healed"
    draw = source.draw

    def faulty(numbers, seed):
        if numbers[0] == 4 and not healed.exists():
            healed.touch()
            time.sleep(60) if fault == "hangs" else os.kill(os.getpid(), signal.SIGKILL)
        return draw(numbers, seed)

    expected = [batch.captions for batch in take(source, 5, batch=2, rank=0, world_size=1)]
    monkeypatch.setattr(source, "draw", faulty)
    assert [b.captions for b in itertools.islice(sources.loader(source, 0, 2, workers=1), 5)] == expected
    assert healed.exists()


def test_workers_that_always_fail_end_in_one_clear_line(monkeypatch):
    monkeypatch.setattr(sources, "RETRIES", 1)
    monkeypatch.setattr(sources, "WORKER_TIMEOUT", 3)
    source = Figures(8)
    monkeypatch.setattr(source, "draw", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="data workers failed 2 times in a row"):
        next(sources.loader(source, 0, 2, workers=1))


@pytest.mark.parametrize("when", ["at the start", "in a worker"])
def test_too_little_shared_memory_is_told_at_the_first_error(monkeypatch, capsys, when):
    share, least = torch.Tensor.share_memory_, 0 if when == "at the start" else sources.QUEUE_BYTES

    def full(tensor):
        if tensor.nbytes > least:
            raise RuntimeError("unable to allocate shared memory(shm) for file </x>: No space left on device (28)")
        return share(tensor)

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(UserError, match=r"^there is too little shared memory .* --workers 0, .* --shm-size"):
        next(sources.loader(Figures(128), 0, 8, workers=1))
    assert "replaced" not in capsys.readouterr().out


TINY_MEMORY = """
mount -t tmpfs -o size=1200k tmpfs /dev/shm || exit 77
exec "$0" -c 'from data import sources; from tests import figures; next(sources.loader(figures.Figures(128), 0, 8, 1))'
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs a file system of its own")
def test_a_machine_with_little_shared_memory_says_so():
    """As a container has it: 64 MB by default. Here there is room for the queues, and for no batch."""
    command = ["unshare", "--mount", "bash", "-c", TINY_MEMORY, sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if done.returncode != 1 or "Error" not in done.stderr:
        pytest.skip("nothing may be mounted here")
    assert "too little shared memory" in done.stderr.strip().splitlines()[-1]


def test_workers_where_there_are_no_signals_of_posix(monkeypatch):
    """As on Windows, which has no SIGUSR1 and no SIGCHLD."""
    monkeypatch.setattr("torch.utils.data._utils.signal_handling.IS_WINDOWS", True)
    for name in ("SIGUSR1", "SIGCHLD"):
        monkeypatch.delattr(signal, name)
    source = Figures(8)
    made = next(sources.loader(source, 0, 2, workers=1))
    assert made.captions == take(source, 1, batch=2, rank=0, world_size=1)[0].captions
