"""Where captioned images come from: the emoji, a folder, or WebDataset shards; and the processes that load them."""

import collections
import contextlib
import hashlib
import itertools
import os
import signal
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from braceexpand import braceexpand
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from common import distributed, stopping
from common.cli import UserError, first_line, signals
from data.pairs import FIELD, IMAGE_SUFFIXES, REFUSED, SMALL, Unusable, read_pair

NAMES = ("emoji",)  # of the built-in data
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
TXT_UNREAD = "The .txt files are not read, because --caption-key names a field of the .json files."
HELD_OUT_OF = 50  # one pair in this number is held out for evaluation
FEWEST = 200  # pairs; of fewer none is held out
WINDOW, WINDOW_SHARDS = 1000, 10  # pairs in a row, and their shards; if most of these are unusable, the run ends
FREE_FAILURES = 20  # in a row without a pause: some shards may be missing for good
PAUSE, GIVE_UP = 1, 120  # seconds: the pause after each further failure, and until the run ends
WORKER_TIMEOUT = 300  # seconds in which a worker must make a batch; longer than GIVE_UP
POLL = 1  # seconds between two checks, while a batch is awaited, whether the run is to stop
RETRIES = 3  # of workers that hang or die, in a row


class Batch(NamedTuple):
    images: torch.Tensor  # [b, 3, R, R] in [−1, 1]
    captions: list[str]
    skipped: collections.Counter  # unusable pairs since the last batch, by cause
    first: dict = {}  # cause: where it first occurred in this process  # noqa: RUF012


class Skips:
    """Counts what a source skips, by cause. Raises UserError if most of the source is unusable or nothing can be read.

    num_shards: of the source. A single bad shard, read from front to end, does not end a run.
    """

    def __init__(self, name, num_shards=1):
        self.name, self.num_shards = name, num_shards
        self.counts = collections.Counter()  # by cause, since the last batch
        self.first = {}  # cause: where it first occurred
        self.failures = 0  # of reading, in a row
        self.clear_window()

    def clear_window(self):
        self.used, self.unusable, self.shards = 0, collections.Counter(), set()

    def use(self, shard=""):
        self.used += 1
        self.check_window(shard)

    def note(self, cause, place):
        """Counts what is left out of a pair; the rest of the pair may be usable."""
        self.first.setdefault(cause, place)
        self.counts[cause] += 1

    def skip(self, cause, place, shard=""):
        self.note(cause, place)
        self.unusable[cause] += 1
        self.check_window(shard)

    def check_window(self, shard):
        self.shards.add(shard)
        number = self.used + self.unusable.total()
        if number < WINDOW or len(self.shards) < min(self.num_shards, WINDOW_SHARDS):
            return
        if self.used < number / 2:
            causes = self.describe(self.unusable)
            raise UserError(f"--data {self.name}: only {self.used} of {number} pairs in a row are usable: {causes}")
        self.clear_window()

    def fail(self, cause, place, shard=""):
        """Skips what could not be read, and waits if the disk or network may recover. Raises UserError, Stopped."""
        self.skip(cause, place, shard)
        if not self.failures:
            self.first_failure, self.failing_since = place, time.monotonic()
        self.failures += 1
        if stopping.asked():
            raise stopping.Stopped
        elapsed = time.monotonic() - self.failing_since
        if elapsed > GIVE_UP and self.failures > 2:  # a single failure may take a minute
            raise UserError(f"--data {self.name}: for {elapsed:.0f} s nothing could be read: {self.first_failure}")
        if self.failures > FREE_FAILURES:
            time.sleep(PAUSE)

    def describe(self, counts):
        """A count by cause in words, with the place where each cause first occurred."""
        return ", ".join(f"{count} {cause} (first: {self.first[cause]})" for cause, count in counts.most_common())


class Source:
    """Captioned images. A subclass implements the four methods that raise NotImplementedError here.

    It passes a Sample to `example` and a list of examples to `collate`. It calls `skips.fail` if the disk or network
    fails, and sets `skips.failures` to 0 if it works.

    name: for messages. caption_key: the field of each .json that contains the caption; by default a .txt contains it.
    """

    def __init__(self, name, resolution, seed, caption_key=None, num_shards=1):
        self.name, self.resolution, self.seed, self.caption_key = name, resolution, seed, caption_key
        self.skips = Skips(name, num_shards)
        self.reported = set()  # causes of skips
        self.holds_out = True  # whether any pairs are kept from training

    def batches(self, steps, batch, rank, world_size):
        """For training: yields for each of the steps, a range without an end, a rank's share of `batch` pairs as Batch.

        The seed and the number of a step determine its batch.
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

    def files(self):
        """The paths of its files. A path that does not exist, such as a URL, does no harm."""
        raise NotImplementedError

    def stamp(self):
        """Identifies the data: it changes if a file is added, removed or written again, and not if the data move."""
        digest = hashlib.sha256()
        for path in self.files():
            with contextlib.suppress(OSError):
                facts = os.stat(path)
                identity = f"{os.path.basename(path)} {facts.st_size} {facts.st_mtime_ns}\n"
                digest.update(identity.encode(errors="replace"))
        return digest.hexdigest()[:16]

    def describe(self):
        """The findings, and what is held out, in lines for the user."""
        for line in self.findings():
            yield line.encode("utf-8", "backslashreplace").decode()  # names of files need not be UTF-8
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
            causes = self.skips.describe(self.skips.counts) or "there are none, or all are held out"
            found = " ".join(self.findings())
            raise UserError(f"--data {self.name}: no pair of an image and a caption is usable: {causes}. {found}")
        self.skips = Skips(self.name, self.skips.num_shards)

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
            if cause == REFUSED:
                place = f"{place}: {first_line(error.__cause__)}"
            self.skips.skip(cause, place, sample.shard)
            return None
        self.skips.use(sample.shard)
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

    def evaluation(self, batch=64, held_out=False, rank=0, world_size=1):
        """Batches of all usable pairs, once: the held-out pairs, or those of training.

        A pair has the same one of its captions on any number of ranks.
        """
        examples = self.examples(held_out, rank, world_size)
        while some := list(itertools.islice(examples, batch)):
            yield self.report(self.collate(some))
        self.report(self.skips)

    def evaluation_pairs(self, batch=64, rank=0, world_size=1):
        """Batches of the pairs for evaluation: the held-out pairs, then those of training."""
        for held_out in (True, False):
            yield from self.evaluation(batch, held_out, rank, world_size)

    def report(self, counted):
        """Prints on the main rank why pairs were skipped, each cause once → what was passed: a Batch, or self.skips."""
        for cause in counted.first.keys() - self.reported:
            distributed.say(f"note: skipped and counted: {cause} (first: {counted.first[cause]})")
        self.reported |= counted.first.keys()
        return counted


def some(texts, most=8):
    """The first texts, and how many others there are."""
    first, others = (texts := list(texts))[:most], len(texts) - most
    return ", ".join(first) + (f" and {others} other kinds" if others > 0 else "")


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


# ----------------------------------------------------------------------------------------------------------------------
# What --data names.


def open_data(spec, resolution, seed, caption_key=None, group=1):
    """The Source that --data names: "emoji", a folder of images with captions, or shards (a folder, a file, a pattern,
    URLs, or pipe:COMMAND).

    caption_key: the field of each .json that contains the caption; by default a .txt contains it. group: of the emoji,
    see emoji.Emoji. Raises UserError if nothing usable is found, and if a folder contains both kinds.
    """
    from data.emoji import Emoji  # here, because all kinds are built on Source
    from data.folder import Folder, describe, search
    from data.shards import Shards

    if spec == "emoji":
        if caption_key:
            raise UserError("--caption-key: the emoji have captions; leave it out")
        return Emoji(resolution, seed, group)
    is_folder = os.path.isdir(spec)
    shards = shards_in(spec) if is_folder else expand_shards(spec)
    if not shards:
        return Folder(spec, resolution, seed, caption_key)
    pairs, *beside = search(spec, caption_key) if is_folder else ([], {}, {})
    if pairs:
        raise UserError(
            f"--data {spec} contains {len(pairs)} images with captions and {len(shards)} shard(s), such as "
            f"{Path(shards[0]).name}: name a shard or a pattern of them, or move them away to train on the images"
        )
    return Shards(shards, resolution, seed, caption_key, describe(*beside))


def shards_in(folder):
    """The shards directly in a folder, sorted."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"--data {folder} cannot be read: {error.strerror}") from error
    paths = [os.path.join(folder, name) for name in names if name.lower().endswith(SHARD_SUFFIXES) and name[0] != "."]
    return [path for path in paths if os.path.isfile(path) and not leads_out(path, folder)]


def leads_out(path, folder):
    """Whether a path in a folder is a link to a place outside of the folder."""
    inside = os.path.join(os.path.realpath(folder), "")
    return os.path.islink(path) and not os.path.join(os.path.realpath(path), "").startswith(inside)


def expand_shards(spec):
    """A shard's file, URL or command, or a pattern such as data/{00000..00041}.tar → the shards; [] for other paths."""
    if not spec.startswith("pipe:") and not spec.lower().endswith(SHARD_SUFFIXES):
        return []
    try:
        return [spec] if os.path.isfile(spec) else list(braceexpand(spec, escape=False))
    except ValueError as error:
        message = f"--data {spec}: the braces do not match; write shards as data/{{00000..00041}}.tar"
        raise UserError(message) from error


# ----------------------------------------------------------------------------------------------------------------------
# Workers.


def loader(source, first, batch, workers):
    """An endless iterator of this rank's share of each global batch from number `first` on, loaded by worker processes.

    Workers that hang or are killed are replaced, and their batches are made again. Raises Stopped if the process is
    asked to stop while it waits for a batch, and UserError if the data cannot be read.
    """
    share = batch // distributed.world_size(), distributed.rank(), distributed.world_size()
    options = {"num_workers": workers, "worker_init_fn": leave_signals_to_the_run, "timeout": POLL if workers else 0}
    failures = 0
    while True:
        try:
            batches = iter(DataLoader(Stream(source, first, *share), batch_size=None, **options))
            # DataLoader's handler would raise anywhere in the run when a worker dies; `wait_for` notices it too.
            for number in signals("SIGCHLD"):
                signal.signal(number, signal.SIG_DFL)
            while True:
                yield source.report(wait_for(batches))
                first, failures = first + 1, 0
        except UserError as error:  # a worker's message contains its traceback
            raise UserError(str(error).strip().splitlines()[-1].partition("UserError: ")[2] or str(error)) from error
        except (RuntimeError, EOFError, ConnectionError) as error:  # DataLoader raises these when a worker dies
            if stopping.asked():  # the signal ended the workers too
                raise stopping.Stopped from None
            failures += 1
            if failures > RETRIES:
                raise UserError(f"the data workers failed {failures} times in a row: {first_line(error)}") from error
            tqdm.write(f"note: a data worker failed and is replaced ({first_line(error)})")


def wait_for(batches):
    """The next batch of a DataLoader's iterator whose timeout is POLL. Raises RuntimeError after WORKER_TIMEOUT."""
    deadline = time.monotonic() + WORKER_TIMEOUT
    while True:
        try:
            return next(batches)
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error):
                raise
            if stopping.asked():
                raise stopping.Stopped from None
            if time.monotonic() > deadline:
                raise RuntimeError(f"no batch came for {WORKER_TIMEOUT} s") from error


def leave_signals_to_the_run(_):
    """Ctrl-C and a scheduler's warning reach the workers too, but the main process decides when to stop."""
    for number in signals("SIGINT", "SIGUSR1", "SIGHUP"):
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
        for batch in self.source.batches(range(self.first + offset, 2**62, stride), *self.share):
            if worker:
                share_memory(batch.images)  # the queue would do so too, but in a thread whose errors are lost
            yield batch


def share_memory(images):
    """Moves a tensor to shared memory. Raises UserError if that is full."""
    try:
        images.share_memory_()
    except RuntimeError as error:
        if "No space left" not in str(error):
            raise
        raise UserError(
            "there is too little shared memory (/dev/shm) for the data workers: use --workers 0, or provide more, for "
            "example with docker run --shm-size 8g"
        ) from error
