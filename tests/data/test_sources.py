"""What every source does, and the workers that load it: order, resume, stopping, and failures."""

import itertools
import os
import signal
from collections import Counter

import pytest
import torch

from common import stopping
from common.cli import UserError
from data import shards, sources
from data.pairs import EMPTY, ENCODING, FILE, IMAGE, SHARD
from tests.data.files import COLORS, captions_of, good, named, source_of, take, write_folder, write_shard
from tests.figures import Figures


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path, named(map(good, range(6))))
    return tmp_path


def loaded(source, count, first=0, workers=1):
    return list(itertools.islice(sources.loader(source, first, 4, workers), count))


def test_a_folder_gives_pairs_that_belong_together(folder):
    batch, next_epoch = take(source_of(folder), 2, batch=6)
    assert batch.captions != next_epoch.captions and sorted(batch.captions) == sorted(next_epoch.captions)
    assert batch.images.shape == (6, 3, 16, 16) and batch.images.min() >= -1 and batch.images.max() <= 1
    assert sorted(batch.captions) == [f"picture {i}" for i in range(6)]  # an epoch contains each once
    for image, text in zip(batch.images, batch.captions, strict=True):
        assert tuple(255 * (image.mean((1, 2)) > 0).int()) == COLORS[int(text.split()[1])]


def test_ranks_share_the_global_batch_and_any_step_can_be_the_first(folder):
    """Captions too are drawn alike."""
    for path in folder.glob("*.txt"):
        path.write_text("\n".join(f"{path.stem} {line}" for line in range(9)))
    source = source_of(folder)
    whole = take(source, 3)
    shares = [take(source, 3, batch=2, rank=rank, world_size=2) for rank in range(2)]
    for step in range(3):
        assert whole[step].captions == shares[0][step].captions + shares[1][step].captions
    (later,) = take(source, 1, first=2)
    assert later.captions == whole[2].captions and torch.equal(later.images, whole[2].images)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_resumed_stream_is_exact(tmp_path, monkeypatch, kind):
    """Within a block of a shard's stream and across blocks. Some pictures are broken."""
    monkeypatch.setattr(shards, "BLOCK", 20)
    monkeypatch.setattr(shards, "BUFFER", 16)
    for part in range(3):
        samples = [good(40 * part + i) | ({"jpg": b"broken"} if i % 4 == 0 else {}) for i in range(40)]
        if kind == "shards":
            write_shard(tmp_path / f"{part}.tar", samples)
        else:
            write_folder(tmp_path / str(part), named(samples))
    source = source_of(tmp_path / "{0..2}.tar" if kind == "shards" else tmp_path)
    for workers in (0, 2):
        whole = captions_of(loaded(source, 12, workers=workers))
        assert len(set(whole)) > 24  # of 48, drawn from 90
        for first in (1, 5, 7):
            assert captions_of(loaded(source, 12 - first, first, workers)) == whole[4 * first :]


def test_broken_images_and_captions_are_skipped_counted_and_reported_with_their_names(folder, capsys):
    (folder / "000000.jpg").write_bytes((folder / "000000.jpg").read_bytes()[:200])
    (folder / "000002.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "000003.txt").write_text("  ")
    made = loaded(source_of(folder), 6, workers=2)
    assert set(captions_of(made)) == {"picture 1", "picture 4", "picture 5"}
    skipped = sum((batch.skipped for batch in made), Counter())
    assert skipped.keys() == {IMAGE, ENCODING, EMPTY}
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 3 and sum(f"{EMPTY} (first: {folder}/000003.jpg)" in line for line in notes) == 1
    assert skipped == sum((batch.skipped for batch in source_of(folder).batches(range(6), 4, 0, 1)), Counter())


def test_a_source_that_is_wholly_broken_is_refused(folder):
    for path in folder.glob("*.jpg"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"^--data.*: no.* usable.* 6 files .* \(first: .*0"):
        source_of(folder)


def test_shards_that_vanish_end_in_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PAUSE", 0.01)
    monkeypatch.setattr(sources, "GIVE_UP", 0.3)
    for shard in range(4):
        write_shard(tmp_path / f"{shard:05d}.tar", [good(i) for i in range(40)])
    batches = sources.loader(source_of(tmp_path / "{00000..00003}.tar"), 0, 8, workers=1)
    next(batches)
    (tmp_path / "00002.tar").unlink()
    skipped = sum((next(batches).skipped for _ in range(60)), Counter())
    assert skipped[SHARD] > 0 and skipped.total() == skipped[SHARD]
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=r"^--data .*nothing could be read: .*0000\d.tar: .*No such file"):
        for _ in range(1000):
            next(batches)


def test_a_disk_that_comes_back_ends_nothing_and_while_it_is_away_a_run_can_be_stopped(folder, monkeypatch):
    source, away = source_of(folder), folder.with_name("away")
    folder.rename(away)
    monkeypatch.setattr(sources.time, "sleep", lambda _: away.exists() and away.rename(folder))
    (batch,) = take(source, 1)
    assert len(batch.captions) == 4 and batch.skipped.keys() == {FILE} and source.skips.failing_since is None
    folder.rename(away)
    monkeypatch.setattr(stopping, "asked", lambda: True)
    with pytest.raises(stopping.Stopped):
        loaded(source, 1, workers=0)


@pytest.mark.parametrize("asked", [False, True])
def test_workers_that_are_killed_end_the_run_in_one_clear_line_or_stop_it(monkeypatch, asked):
    """A scheduler's SIGTERM, which asks the run to stop, ends them too."""
    monkeypatch.setattr(Figures, "draw", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(stopping, "asked", lambda: asked)
    clear_line = r"^a data worker failed \(DataLoader .*\); the same command resumes the run"
    with pytest.raises(stopping.Stopped if asked else UserError, match=None if asked else clear_line):
        loaded(Figures(8), 1)


def test_the_caption_of_evaluation_depends_on_picture_and_seed():
    examples = [(torch.full((3, 2, 2), i / 40), ["a", "b", "c"]) for i in range(40)]
    first, same, other = (Figures(8, seed=seed).collate(examples).captions for seed in (0, 0, 1))
    assert first == same != other and set(first) == {"a", "b", "c"}
