"""Where captioned images come from: the emoji, a folder, or WebDataset shards; and the processes that load them."""

import collections
import hashlib
import itertools
import os
import signal
import time
import zlib
from typing import NamedTuple

import torch
from braceexpand import braceexpand
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from common import distributed, stopping
from common.cli import UserError, first_line
from data.pairs import FIELD, IMAGE_SUFFIXES, SMALL, Unusable, read_pair

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
JSON_UNREAD = "Captions in .json files need --caption-key, with the name of their field."
HELD_OUT_OF = 50  # one pair in this number is held out for evaluation
FEWEST = 200  # pairs; of fewer none is held out
PAUSE, GIVE_UP = 0.1, 120  # seconds: the pause after a failure, and the time without a success after which a run ends
ENDLESS = 2**62  # stands for infinity, because range and islice need a whole number


class Batch(NamedTuple):
    images: torch.Tensor  # [b, 3, R, R] in [−1, 1]
    captions: list[str]
    skipped: collections.Counter  # unusable pairs since the last batch, by cause
    first: dict = {}  # cause: where it first occurred in this process  # noqa: RUF012


class Skips:
    """Counts what a source skips, by cause, and where each cause first occurred."""

    def __init__(self, name):
        self.name = name  # of the source
        self.counts = collections.Counter()  # by cause, since the last batch
        self.first = {}  # cause: where it first occurred
        self.failing_since = None  # the time of the first failure of reading since the last success

    def skip(self, cause, place):
        self.first.setdefault(cause, place)
        self.counts[cause] += 1

    def fail(self, cause, place):
        """Skips what could not be read, and waits if the disk or network may recover. Raises UserError, Stopped."""
        self.skip(cause, place)
        if stopping.asked():
            raise stopping.Stopped
        self.failing_since = self.failing_since or time.monotonic()
        elapsed = time.monotonic() - self.failing_since
        if elapsed > GIVE_UP:
            raise UserError(f"--data {self.name}: for {elapsed:.0f} s nothing could be read: {place}")
        time.sleep(PAUSE)


class Source:
    """Captioned images. A subclass implements `examples`; for training also `batches`, and `findings` or `describe`.

    It passes a Sample to `example` and a list of examples to `collate`. It calls `skips.fail` if the disk or network
    fails, and sets `skips.failing_since` to None if it works.

    name: for messages. caption_key: the field of each .json that contains the caption; by default a .txt contains it.
    """

    def __init__(self, name, resolution, seed, caption_key=None):
        self.name, self.resolution, self.seed, self.caption_key = name, resolution, seed, caption_key
        self.skips = Skips(name)
        self.reported = set()  # causes of skips
        self.holds_out = True  # whether any pairs are kept from training

    def batches(self, steps, batch, rank, world_size):
        """For training: yields for each of the steps, a range without an end, a rank's share of `batch` pairs as Batch.

        The seed and the number of a step determine its batch; with shards, also the numbers of ranks and workers.
        """
        raise NotImplementedError

    def examples(self, held_out=False, rank=0, world_size=1):
        """For evaluation: yields a rank's share of the pairs once, as (image [3, R, R], all its captions): the held-out
        pairs, or those of training. `report(self.skips)` then prints what was skipped.
        """
        raise NotImplementedError

    def findings(self):
        """What the source contains, in lines for the user."""
        raise NotImplementedError

    def describe(self):
        """The findings, and what is held out, in lines for the user."""
        yield from self.findings()
        if self.holds_out:
            yield f"One pair in {HELD_OUT_OF}, by a hash of its picture, is held out for evaluation."
        else:
            yield f"None is held out for evaluation, as there are fewer than {FEWEST}: evaluation uses training pairs."

    def announce(self):
        """Prints the description on the main rank."""
        for line in self.describe():
            distributed.say(line)

    def check(self, usable):
        """Raises UserError unless a usable pair was found. What was skipped until now is not counted again."""
        if not usable:
            counts = self.skips.counts.most_common()
            causes = ", ".join(f"{count} {cause} (first: {self.skips.first[cause]})" for cause, count in counts)
            message = f"--data {self.name}: no pair is usable: {causes or 'there are none, or all are held out'}"
            raise UserError(f"{message}. {' '.join(self.findings())}")
        self.skips = Skips(self.name)

    def is_for(self, sample, held_out):
        """Whether a sample belongs to the held-out pairs, or to those of training."""
        return (self.holds_out and is_held_out(sample.image, sample.facts)) == held_out

    def example(self, sample):
        """A Sample → (image [3, R, R], captions). None if it is unusable; this is counted."""
        if not sample.parts.keys() & {".txt", *IMAGE_SUFFIXES}:
            return None  # files of another kind
        try:
            example = read_pair(sample, self.resolution, self.caption_key)
        except Unusable as error:
            cause, place = str(error), sample.place
            if cause == FIELD and sample.facts:
                place = f"{place} has {', '.join(sample.facts)}"
            if cause == SMALL:
                place = f"{place}; {self.resolution} pixels are needed"
            self.skips.skip(cause, place)
            return None
        return example

    def collate(self, examples, rng=None):
        """A list of (image, captions) → a Batch with one caption for each image.

        rng draws the captions; without it, they depend on the picture and the seed alone.
        """
        captions = []
        for image, lines in examples:
            number = rng.integers(len(lines)) if rng else zlib.crc32(image.numpy().tobytes(), self.seed)
            captions.append(lines[number % len(lines)])
        skipped, self.skips.counts = self.skips.counts, collections.Counter()
        return Batch(torch.stack([image for image, _ in examples]), captions, skipped, dict(self.skips.first))

    def evaluation_batches(self, batch=64, held_out=False, rank=0, world_size=1, most=ENDLESS):
        """For evaluation: batches of what `examples` yields, at most so many pairs. A pair has the same one of its
        captions on any number of ranks.
        """
        examples = itertools.islice(self.examples(held_out, rank, world_size), most)
        while some := list(itertools.islice(examples, batch)):
            yield self.report(self.collate(some))
        self.report(self.skips)

    def held_out_first(self, batch=64, rank=0, world_size=1, count=ENDLESS):
        """For evaluation: batches of `count` pairs, shared by the ranks: of each rank's pairs first the held-out ones,
        then those of training.
        """
        left = len(range(rank, count, world_size))  # this rank's share of `count`
        for held_out in (True, False):
            for pairs in self.evaluation_batches(batch, held_out, rank, world_size, left):
                left -= len(pairs.captions)
                yield pairs

    def report(self, counted):
        """Prints on the main rank why pairs were skipped, each cause once → what was passed: a Batch, or self.skips."""
        for cause in counted.first.keys() - self.reported:
            distributed.say(f"note: skipped and counted: {cause} (first: {counted.first[cause]})")
        self.reported |= counted.first.keys()
        return counted


def is_held_out(image, facts):
    """Whether a pair is held out: by a hash of its picture, so that all copies of it are held out.

    image: the file's bytes. facts: its .json, in which img2dataset writes the `sha256` of the original picture.
    """
    digest = facts.get("sha256")
    if not isinstance(digest, str) or len(digest) != 64:
        digest = hashlib.sha256(image or b"").hexdigest()
    return zlib.crc32(digest.encode()) % HELD_OUT_OF == 0


def sample_indices(step, batch, rank, world_size):
    """The numbers, counted over the whole run and all ranks, of the samples that a rank sees in a step."""
    first = (step * world_size + rank) * batch
    return range(first, first + batch)


def open_data(spec, resolution, seed, caption_key=None, group=1):
    """The Source that --data names: "emoji", a folder of images with captions, or shards (a file, a pattern such as
    data/{00000..00041}.tar, or pipe:COMMAND).

    caption_key: the field of each .json that contains the caption; by default a .txt contains it. group: of the emoji,
    see emoji.Emoji. Raises UserError if nothing usable is found.
    """
    from data.emoji import Emoji  # here, because all kinds are built on Source
    from data.folder import Folder
    from data.shards import Shards

    if spec == "emoji":
        if caption_key:
            raise UserError("--caption-key: the emoji have captions; leave it out")
        return Emoji(resolution, seed, group)
    if os.path.isdir(spec) or not (spec.startswith("pipe:") or spec.lower().endswith(SHARD_SUFFIXES)):
        return Folder(spec, resolution, seed, caption_key)
    try:
        shards = [spec] if os.path.isfile(spec) else list(braceexpand(spec, escape=False))
    except ValueError as error:
        raise UserError(f"--data {spec}: the braces do not match; write data/{{00000..00041}}.tar") from error
    return Shards(shards, resolution, seed, caption_key)


def loader(source, first, batch, workers):
    """An endless iterator of this rank's share of each global batch from number `first` on, loaded by worker processes.

    Raises UserError if the data cannot be read, or if a worker dies; but Stopped if the run was asked to stop.
    """
    share = batch // distributed.world_size(), distributed.rank(), distributed.world_size()
    options = {"batch_size": None, "num_workers": workers, "worker_init_fn": leave_signals_to_the_run}
    options["collate_fn"] = Batch._make  # DataLoader's own would double the counts of a Counter
    try:
        batches = iter(DataLoader(Stream(source, first, *share), **options))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would raise in the middle of a step
        yield from map(source.report, batches)
    except UserError as error:  # a worker's message contains its traceback
        raise UserError(str(error).strip().splitlines()[-1].partition("UserError: ")[2] or str(error)) from error
    except (RuntimeError, EOFError, OSError) as error:  # a worker died, or could not be started
        if stopping.asked():  # the signal ended the workers too
            raise stopping.Stopped from None
        raise UserError(
            f"a data worker failed ({first_line(error)}); the same command resumes the run. If the memory or /dev/shm "
            "is too small, give fewer --workers"
        ) from error


def leave_signals_to_the_run(_):
    """Ctrl-C and a scheduler's warning reach the workers too, but the main process decides when to stop."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Stream(IterableDataset):
    """A source's training batches for one rank. Worker k of n makes batches k, k + n, …, so their order is fixed."""

    def __init__(self, source, first, *share):
        self.source, self.first = source, first
        self.share = share  # batch of this rank, rank, number of ranks

    def __iter__(self):
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        yield from self.source.batches(range(self.first + offset, ENDLESS, stride), *self.share)
