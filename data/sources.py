"""Where captioned images come from: the emoji, a folder, or WebDataset shards; and the processes that load them."""

import collections
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
from data.pairs import Tally

EMOJI = Path(__file__).parent / "emoji.tar.gz"
NAMES = ("emoji",)  # of the built-in data
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
HELD_OUT_OF = 50  # one pair in so many is held out for evaluation
FEWEST = 200  # pairs; of fewer none is held out
AT_ONCE = 20  # failures in a row that are passed over at once: some shards may be missing for good
PAUSE, GIVEN_UP = 1, 120  # seconds to wait after each further one, and in which none may be read
WORKER_TIMEOUT = 300  # seconds in which a worker must make a batch; longer than its own patience
POLL = 1  # seconds of waiting for a batch after which the run is asked whether to stop
RETRIES = 3  # of workers that hang or die, in a row


class Batch(NamedTuple):
    images: torch.Tensor  # [b, 3, R, R] in [−1, 1]
    captions: list[str]
    skipped: collections.Counter  # the pairs passed over on the way, by cause
    notes: dict = {}  # cause: where it was met, if for the first time  # noqa: RUF012


class Source:
    """Captioned images. A kind of source has the three methods that raise NotImplementedError here.

    A pair that cannot be used is passed over: `tally.skip(cause, where)`; one that can, `tally.use()`. `collate` makes
    a batch of some examples. After a failure of the disk or the network comes `patience.fail(error)`.

    name: for messages. caption_key: the field of each .json that holds the caption, if no .txt does.
    """

    def __init__(self, name, resolution, seed, caption_key=None):
        self.name, self.resolution, self.seed, self.caption_key = name, resolution, seed, caption_key
        self.tally, self.patience = Tally(name), Patience(name)
        self.holds_out = True  # whether any pairs are kept from training
        self.told = set()  # causes of the notes that were told

    def batches(self, steps, batch, rank, world_size):
        """For training: for each of the steps, a range without an end, a rank's share of `batch` pairs, as a Batch.

        The seed and the number of a step decide what it holds.
        """
        raise NotImplementedError

    def examples(self, held_out=False, rank=0, world_size=1):
        """For evaluation: a rank's share of the pairs, once each, as (image [3, R, R], all its captions): those that
        training never sees, or the others.
        """
        raise NotImplementedError

    def describe(self):
        """What was found, in lines for the user."""
        raise NotImplementedError

    def evaluation(self, batch=64, held_out=False, rank=0, world_size=1):
        """Batches of every pair that can be used, once; held_out: of those alone that training never sees.

        A pair has the same one of its captions on any number of ranks.
        """
        examples = self.examples(held_out, rank, world_size)
        while some := list(itertools.islice(examples, batch)):
            images, captions = zip(*some, strict=True)
            numbers = (zlib.crc32(image.numpy().tobytes(), self.seed) for image in images)
            drawn = [lines[number % len(lines)] for lines, number in zip(captions, numbers, strict=True)]
            yield self.tell(Batch(torch.stack(images), drawn, *self.tally.take()))

    def evaluation_pairs(self, batch=64, rank=0, world_size=1):
        """Batches of the pairs to evaluate with: those held out first, then those of training."""
        for held_out in (True, False):
            yield from self.evaluation(batch, held_out, rank, world_size)

    def tell(self, batch):
        """Says on the main rank what a batch passed over for the first time → the batch."""
        for cause in batch.notes.keys() - self.told:
            distributed.say(f"note: of the data is passed over, and counted: {batch.notes[cause]}")
        self.told |= batch.notes.keys()
        return batch

    def said_of_held_out(self):
        if self.holds_out:
            return f"One pair in {HELD_OUT_OF}, by a hash of its picture, is held out for evaluation."
        return f"None is held out for evaluation, as there are fewer than {FEWEST}: it sees what training sees."


def collate(examples, rng, tally):
    """Some (image, captions) → a Batch, for each image one of its captions."""
    images, captions = zip(*examples, strict=True)
    return Batch(torch.stack(images), [lines[rng.integers(len(lines))] for lines in captions], *tally.take())


def is_held_out(image, facts):
    """Whether a pair is held out: by a hash of its picture, so that a copy under another name is held out with it.

    image: the file's bytes. facts: its .json, where img2dataset writes the `sha256` of the picture as it was found.
    """
    named = facts.get("sha256")
    if not isinstance(named, str) or len(named) != 64:
        named = hashlib.sha256(image or b"").hexdigest()
    return zlib.crc32(named.encode()) % HELD_OUT_OF == 0


def sample_indices(step, batch, rank, world_size):
    """The numbers, counted over the whole run and all ranks, of the samples that a rank sees in a step."""
    first = (step * world_size + rank) * batch
    return range(first, first + batch)


class Patience:
    """Waits for a source that fails again and again, and at last gives up."""

    def __init__(self, name):
        self.name, self.failures = name, 0

    def succeed(self):
        self.failures = 0

    def fail(self, error):
        """Waits if that may help. Raises UserError with the first error of those in a row, or Stopped."""
        if not self.failures:
            self.first, self.since = first_line(error), time.monotonic()
        self.failures += 1
        if stopping.asked():
            raise stopping.Stopped
        elapsed = time.monotonic() - self.since
        if elapsed > GIVEN_UP and self.failures > 2:  # a failure itself may take a minute
            raise UserError(f"--data {self.name}: for {elapsed:.0f} s nothing could be read: {self.first}")
        if self.failures > AT_ONCE:
            time.sleep(PAUSE)


# ----------------------------------------------------------------------------------------------------------------------
# What --data names.


def open_data(spec, resolution, seed, caption_key=None):
    """The source named by --data: "emoji", a folder of images with captions, or shards (a folder, a file, a pattern,
    URLs, or pipe:COMMAND).

    caption_key: the field of each .json that holds the caption, where no .txt does. Raises UserError where nothing
    usable is there, and where it is not clear what is meant.
    """
    from data.folder import Folder, Search  # here, as both kinds are built on Source
    from data.shards import Shards

    if spec == "emoji":
        return Shards([str(EMOJI)], resolution, seed)
    is_folder = os.path.isdir(spec)
    shards = shards_in(spec) if is_folder else expand_shards(spec)
    if not shards:
        return Folder(spec, resolution, seed, caption_key)
    if is_folder and (pairs := Search(spec, caption_key).pairs):
        raise UserError(
            f"--data {spec} holds {len(pairs)} images with captions and beside them {len(shards)} shard(s), as "
            f"{Path(shards[0]).name}: name a shard or a pattern of them, or move them away to train on the images"
        )
    return Shards(shards, resolution, seed, caption_key)


def shards_in(folder):
    """The shards that lie in a folder itself, sorted."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"--data {folder} cannot be read: {error.strerror}") from error
    paths = [os.path.join(folder, name) for name in names if name.lower().endswith(SHARD_SUFFIXES) and name[0] != "."]
    return [path for path in paths if os.path.isfile(path) and not leads_out(path, folder)]


def leads_out(path, folder):
    """Whether a file or folder in a folder is a link to what lies elsewhere."""
    inside = os.path.join(os.path.realpath(folder), "")
    return os.path.islink(path) and not os.path.join(os.path.realpath(path), "").startswith(inside)


def expand_shards(spec):
    """A shard's file, URL or command, or a pattern of them, as data/{00000..00041}.tar, → the shards; else → none."""
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

    Workers that hang or are killed are replaced, and their batches made again. Raises Stopped where the process is
    asked to stop while a batch is waited for, UserError where the data cannot be read.
    """
    share = batch // distributed.world_size(), distributed.rank(), distributed.world_size()
    options = {"num_workers": workers, "worker_init_fn": leave_signals_to_the_run, "timeout": POLL if workers else 0}
    failures = 0
    while True:
        try:
            batches = iter(DataLoader(Stream(source, first, *share), batch_size=None, **options))
            # DataLoader's handler raises at a worker's death, wherever the run happens to be; waiting sees it too.
            for number in signals("SIGCHLD"):
                signal.signal(number, signal.SIG_DFL)
            while True:
                yield source.tell(wait_for(batches))
                first, failures = first + 1, 0
        except UserError as error:  # a worker's comes with its traceback
            raise UserError(str(error).strip().splitlines()[-1].partition("UserError: ")[2] or str(error)) from error
        except (RuntimeError, EOFError, ConnectionError) as error:  # what becomes of DataLoader when a worker dies
            if stopping.asked():  # and the workers with the run
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
    """Ctrl-C and a warning of preemption reach the workers too; the run they serve decides when to stop."""
    for number in signals("SIGINT", "SIGUSR1", "SIGHUP"):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Stream(IterableDataset):
    """A source's training batches for one rank. Worker k of n makes batches k, k + n, …, so their order stays fixed."""

    def __init__(self, source, first, *share):
        self.source, self.first = source, first
        self.share = share  # batch of this rank, rank, number of ranks

    def __iter__(self):
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in self.source.batches(range(self.first + offset, 2**62, stride), *self.share):
            if worker:
                share_memory(batch.images)  # the queue would do it as well, but in a thread, whose errors reach nobody
            yield batch


def share_memory(images):
    """Moves a tensor to shared memory. Raises UserError where that is full."""
    try:
        images.share_memory_()
    except RuntimeError as error:
        if "No space left" not in str(error):
            raise
        raise UserError(
            "there is too little shared memory (/dev/shm) for the data workers: take --workers 0, or give more, as by "
            "docker run --shm-size 8g"
        ) from error
