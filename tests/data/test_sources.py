"""What every source does, and the workers that load it: order, resume, stopping, and failures."""

import itertools
import os
import signal
import threading
import time
from collections import Counter

import pytest
import torch

from common import stopping
from common.cli import UserError
from data import shards, sources
from data.pairs import EMPTY, ENCODING, FILE, IMAGE, SHARD
from data.sources import Skips
from tests.data.files import (
    COLORS,
    PICTURE,
    captions_of,
    color_of,
    good,
    named,
    opened,
    seen,
    source_of,
    take,
    write_folder,
    write_shard,
)
from tests.figures import Figures


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path, named(map(good, range(6))))
    return tmp_path


def loaded(source, count, first=0, workers=1):
    return list(itertools.islice(sources.loader(source, first, 4, workers), count))


def belong_together(batch):
    return all(color_of(image) == COLORS[int(c.split()[1]) % 6] for image, c in zip(*batch[:2], strict=True))


def test_a_folder_gives_pairs_that_belong_together(folder):
    batch, next_epoch = take(source_of(folder), 2, batch=6)
    assert batch.captions != next_epoch.captions and sorted(batch.captions) == sorted(next_epoch.captions)
    assert batch.images.shape == (6, 3, 16, 16) and batch.images.min() >= -1 and batch.images.max() <= 1
    assert sorted(batch.captions) == [f"picture {i}" for i in range(6)]  # an epoch contains each once
    assert belong_together(batch)


def test_shards_as_img2dataset_writes_them(tmp_path):
    for shard in range(2):
        write_shard(tmp_path / f"{shard:05d}.tar", [good(6 * shard + i) for i in range(6)])
    for spec in (tmp_path, tmp_path / "{00000..00001}.tar", tmp_path / "00000.tar"):
        batches = take(source_of(spec), 4)
        assert len(set(captions_of(batches))) > 4 and all(map(belong_together, batches))
        assert seen(source_of(spec), 4) == captions_of(batches)  # the same start, the same stream
    assert seen(source_of(spec), 4, rank=1, world_size=2) != captions_of(batches)


def test_ranks_share_the_global_batch_and_any_step_can_be_the_first(folder):
    source = source_of(folder)
    whole = take(source, 3)
    shares = [take(source, 3, batch=2, rank=rank, world_size=2) for rank in range(2)]
    for step in range(3):
        assert whole[step].captions == shares[0][step].captions + shares[1][step].captions
    (later,) = take(source, 1, first=2)
    assert later.captions == whole[2].captions and torch.equal(later.images, whole[2].images)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_resumed_stream_is_exact(tmp_path, monkeypatch, kind):
    """Within a block of a shard's stream and across blocks; a folder's also with another number of workers."""
    monkeypatch.setattr(shards, "BLOCK", 20)
    monkeypatch.setattr(shards, "BUFFER", 16)
    for part in range(3):
        samples = [good(40 * part + i) for i in range(40)]
        if kind == "shards":
            write_shard(tmp_path / f"{part}.tar", samples)
        else:
            write_folder(tmp_path / str(part), named(samples))
    source = source_of(tmp_path)
    for workers in (0, 2):
        if workers == 0 or kind == "shards":
            whole = captions_of(loaded(source, 12, workers=workers))
        assert len(set(whole)) > 24  # of 48, drawn from 120
        for first in (1, 5, 7):
            assert captions_of(loaded(source, 12 - first, first, workers)) == whole[4 * first :]


# ----------------------------------------------------------------------------------------------------------------------
# Broken data.


def test_broken_images_and_captions_are_skipped_counted_and_reported_with_their_names(folder, capsys):
    (folder / "000000.jpg").write_bytes((folder / "000000.jpg").read_bytes()[:200])
    (folder / "000001.jpg").write_bytes((folder / "000001.jpg").read_bytes()[:100])
    (folder / "000002.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "000003.txt").write_text("  ")
    made = loaded(source_of(folder), 6, workers=2)
    assert set(captions_of(made)) == {"picture 4", "picture 5"}
    skipped = sum((batch.skipped for batch in made), Counter())
    assert skipped[IMAGE] >= 2 and skipped[ENCODING] >= 1 and skipped[EMPTY] >= 1
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 3 and sum(f"{EMPTY} (first: {folder}/000003.jpg)" in line for line in notes) == 1


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_source_that_is_mostly_broken_ends_in_one_clear_line(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(sources, "WINDOW", 100)
    pairs = [good(i) if i % 3 == 0 else {"jpg": b"<html>", "txt": b"x"} for i in range(60)]
    source = opened(kind, tmp_path, named(pairs))
    with pytest.raises(UserError, match=r"^--data .*only \d+ of 100 pairs in a row are usable: \d+ files"):
        loaded(source, 200, workers=int(kind == "folder"))  # a worker's message contains its traceback
    for pair in pairs:
        pair["jpg"] = b"broken"
    with pytest.raises(UserError, match=r"^--data.*: no.* usable.* \d+ files .* \(first: .*0"):
        opened(kind, tmp_path, named(pairs))


def test_skips_end_a_run_if_most_pairs_of_several_shards_are_unusable():
    """With 40 % unusable pairs, chance ends a run once in ten thousand years. One bad shard does not end it."""
    skips = Skips("some")
    for bad in torch.rand(30_000, generator=torch.Generator().manual_seed(0)) < 0.4:
        skips.skip(EMPTY, "x") if bad else skips.use()
        skips.note(EMPTY, "x")  # of which a sample that is used may have several
    skips = Skips("some", num_shards=12)
    for shard in range(12):
        for _ in range(3000):
            skips.use(shard) if shard else skips.skip(EMPTY, "x", shard)
    with pytest.raises(UserError, match=r"--data some: only \d+ of \d+ pairs in a row are usable: \d+ .* \(first: x\)"):
        for i in range(100_000):
            skips.skip(EMPTY, "later", i % 12)


def test_shards_that_vanish_end_in_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PAUSE", 0.01)
    monkeypatch.setattr(sources, "GIVE_UP", 0.3)
    for shard in range(4):
        write_shard(tmp_path / f"{shard:05d}.tar", [good(i) for i in range(40)])
    batches = sources.loader(source_of(tmp_path), 0, 8, workers=1)
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
    monkeypatch.setattr(sources, "GIVE_UP", 1)
    source, away = source_of(folder), folder.with_name("away")
    folder.rename(away)
    back = threading.Timer(0.3, lambda: away.rename(folder))
    back.start()
    assert len(take(source, 1)[0].captions) == 4 and source.skips.failures == 0
    back.join()
    for path in folder.glob("*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match=r"nothing could be read: .*No such file or directory"):
        take(source, 1)
    monkeypatch.setattr(stopping, "asked", lambda: True)
    with pytest.raises(stopping.Stopped):
        loaded(source, 1, workers=0)


@pytest.mark.parametrize(("seconds", "failures"), [(0, 20 + 122), (60, 4), (130, 3)])
def test_reading_is_given_up_after_two_minutes_however_long_a_failure_takes(monkeypatch, seconds, failures):
    now = [0.0]
    monkeypatch.setattr("data.sources.time.monotonic", lambda: now[0])
    monkeypatch.setattr("data.sources.time.sleep", lambda pause: now.__setitem__(0, now[0] + pause))
    skips, count = Skips("x"), 0
    skips.fail(FILE, "before")
    skips.failures = 0  # something was read
    with pytest.raises(UserError, match=r"^--data x: for \d\d\d s nothing could be read: the first$"):
        for count in itertools.count(1):
            skips.fail(FILE, "a later one" if count > 1 else "the first")
            now[0] += seconds
    assert count == failures


# ----------------------------------------------------------------------------------------------------------------------
# Workers.


@pytest.fixture
def faulty(monkeypatch):
    """A function that makes a source of figures whose workers call `fault` in place of drawing, if `when` is true."""
    source = Figures(8)
    draw = source.draw

    def with_fault(fault, when=lambda numbers: True):
        monkeypatch.setattr(source, "draw", lambda numbers, seed: fault() if when(numbers) else draw(numbers, seed))
        return source

    return with_fault


def end_worker(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("fault", [lambda: time.sleep(60), end_worker(signal.SIGKILL)], ids=["hangs", "is killed"])
def test_a_worker_that_fails_is_replaced_and_its_batches_made_again(tmp_path, monkeypatch, faulty, fault):
    monkeypatch.setattr(sources, "WORKER_TIMEOUT", 3)
    healed = tmp_path / "healed"

    def third_batch_for_the_first_time(numbers):
        first_time = numbers[0] == 8 and not healed.exists()
        if first_time:
            healed.touch()
        return first_time

    expected = captions_of(take(Figures(8), 5))
    assert captions_of(loaded(faulty(fault, third_batch_for_the_first_time), 5)) == expected and healed.exists()


def test_workers_that_always_fail_end_in_one_clear_line(monkeypatch, faulty):
    monkeypatch.setattr(sources, "RETRIES", 1)
    with pytest.raises(UserError, match="data workers failed 2 times in a row"):
        loaded(faulty(end_worker(signal.SIGKILL)), 1)


def test_workers_that_are_ended_with_the_run_are_not_replaced(monkeypatch, faulty):
    """A scheduler's SIGTERM reaches them too, and ends them at once."""
    monkeypatch.setattr(stopping, "asked", lambda: True)
    with pytest.raises(stopping.Stopped):
        loaded(faulty(end_worker(signal.SIGTERM)), 1)


def test_a_run_is_stopped_while_its_data_stall(monkeypatch, faulty):
    monkeypatch.setattr(sources, "POLL", 0.1)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit) as ended, stopping.listening():
        loaded(faulty(lambda: time.sleep(600)), 1)
    assert ended.value.code == stopping.COME_AGAIN


def test_too_little_shared_memory_is_reported_at_the_first_error(monkeypatch, capsys):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </x>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(UserError, match=r"^there is too little shared memory .* --workers 0, .* --shm-size"):
        loaded(Figures(8), 1)
    assert "replaced" not in capsys.readouterr().out


def test_the_reason_why_a_drawing_is_refused_is_told(tmp_path, capsys):
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><text>a</text></svg>'
    source = opened("folder", tmp_path, named([{"jpg": PICTURE, "txt": b"a"}] * 4 + [{"svg": svg, "txt": b"b"}]))
    next(source.evaluation())
    assert "(first: " in (said := capsys.readouterr().out) and ".svg: text at depth 2)" in said, said


def test_the_caption_of_evaluation_depends_on_picture_and_seed():
    examples = [(torch.full((3, 2, 2), i / 40), ["a", "b", "c"]) for i in range(40)]
    first, same, other = (Figures(8, seed=seed).collate(examples).captions for seed in (0, 0, 1))
    assert first == same != other and set(first) == {"a", "b", "c"}


def test_workers_ignore_the_signals_that_the_run_answers(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    sources.leave_signals_to_the_run(0)
    ignored = {number for number, handler in handlers.items() if handler == signal.SIG_IGN}
    assert ignored == {signal.SIGINT, signal.SIGUSR1, signal.SIGHUP} and handlers[signal.SIGTERM] == signal.SIG_DFL
