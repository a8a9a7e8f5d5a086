"""Where captioned images come from: the emoji, a folder, or WebDataset shards.

A source yields batches to the ranks. `batches` are for training: endless, from any step on, since the seed and the
number of a step decide what it sees. `evaluation` gives every pair once, in a fixed order. `evaluation_pairs` begins
with the pairs that training never sees. A pair that cannot be used is skipped, and its batch counts it by cause.
`describe` says what was found.
"""

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import torch
from braceexpand import braceexpand
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from common import distributed
from common.cli import UserError, first_line, signals
from data.batches import Stopped
from data.folder import Folder, Search
from data.shards import Shards

NAMES = ("emoji",)  # of the built-in data
EMOJI = Path(__file__).parent / "emoji.tar.gz"
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
WORKER_TIMEOUT = 300  # seconds in which a worker must make a batch; longer than its own patience
QUEUE_BYTES = 2**20  # of shared memory that DataLoader needs beside the batches, generously
POLL = 1  # seconds of waiting for a batch after which the run is asked whether to stop
RETRIES = 3  # of workers that hang or die, in a row


def open_data(spec, resolution, seed, caption_key=None):
    """The source named by --data: "emoji", a folder of images with captions, or shards (a folder, a file, a
    pattern, URLs, or pipe:COMMAND).

    caption_key: the field of each .json that holds the caption, where no .txt does. Raises UserError where nothing
    usable is there, and where it is not clear what is meant.
    """
    if spec == "emoji":
        return Shards([str(EMOJI)], resolution, seed)
    if not os.path.isdir(spec):
        if shards := expand_shards(spec):
            return Shards(shards, resolution, seed, caption_key)
        return Folder(spec, resolution, seed, caption_key)
    if not (shards := shards_in(spec)):
        return Folder(spec, resolution, seed, caption_key)
    if pairs := Search(spec, caption_key).pairs:
        raise UserError(
            f"--data {spec} holds {len(pairs)} images with captions and beside them {len(shards)} shard(s), as "
            f"{Path(shards[0]).name}: name a shard or a pattern of them, or move them away to train on the images"
        )
    return Shards(shards, resolution, seed, caption_key)


def shards_in(folder):
    """The shards that lie in a folder itself, sorted."""
    try:
        paths = [os.path.join(folder, name) for name in os.listdir(folder) if not name.startswith(".")]
    except OSError as error:
        raise UserError(f"--data {folder} cannot be read: {error.strerror}") from error
    return sorted(path for path in paths if path.lower().endswith(SHARD_SUFFIXES) and os.path.isfile(path))


def expand_shards(spec):
    """A shard's file, URL or command, or a pattern of them, as data/{00000..00041}.tar, → the shards; else → none."""
    is_command = spec.startswith("pipe:")
    if is_command or spec.lower().endswith(SHARD_SUFFIXES):
        if os.path.isfile(spec):
            return [spec]
        try:
            # A backslash is the shell's in a command, and parts folders on Windows.
            return list(braceexpand(spec, escape=not is_command and os.sep != "\\"))
        except ValueError as error:
            message = f"--data {spec}: the braces do not match; write shards as data/{{00000..00041}}.tar"
            raise UserError(message) from error
    return []


def loader(source, first, batch, workers, asked_to_stop=lambda: False):
    """An endless iterator of this rank's share of each global batch from number `first` on, loaded by worker processes.

    Workers that hang or are killed are replaced, and their batches made again. asked_to_stop: called while a batch is
    waited for. Raises Stopped once it says so, UserError where the data cannot be read.
    """
    share = batch // distributed.world_size(), distributed.rank(), distributed.world_size()
    if not workers and hasattr(source, "patience"):
        source.patience.asked_to_stop = asked_to_stop
    failures = 0
    while True:
        stream, timeout = Stream(source, first, *share), min(POLL, WORKER_TIMEOUT) if workers else 0
        options = {"num_workers": workers, "worker_init_fn": leave_signals_to_the_run, "timeout": timeout}
        try:
            if workers:
                with room_in_shared_memory():
                    torch.empty(QUEUE_BYTES, dtype=torch.uint8).share_memory_()
            batches = iter(DataLoader(stream, batch_size=None, **options))
            # DataLoader's handler raises at a worker's death, wherever the run happens to be; waiting sees it too.
            for number in signals("SIGCHLD"):
                signal.signal(number, signal.SIG_DFL)
            while True:
                yield wait_for(batches, asked_to_stop)
                first, failures = first + 1, 0
        except UserError as error:  # a worker's comes with its traceback
            raise UserError(re.sub(r"^\S*UserError: ", "", str(error).strip().splitlines()[-1])) from error
        except (RuntimeError, EOFError, ConnectionError) as error:  # what becomes of DataLoader when a worker dies
            if asked_to_stop():  # and the workers with the run
                raise Stopped from None
            failures += 1
            if failures > RETRIES:
                raise UserError(f"the data workers failed {failures} times in a row: {first_line(error)}") from error
            tqdm.write(f"note: a data worker failed and is replaced ({first_line(error)})")


def wait_for(batches, asked_to_stop):
    """The next batch of a DataLoader's iterator whose timeout is POLL. Raises RuntimeError after WORKER_TIMEOUT."""
    deadline = time.monotonic() + WORKER_TIMEOUT
    while True:
        try:
            return next(batches)
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error):
                raise
            if asked_to_stop():
                raise Stopped from None
            if time.monotonic() > deadline:
                raise RuntimeError(f"no batch came for {WORKER_TIMEOUT} s") from error


def leave_signals_to_the_run(_):
    """Ctrl-C and a warning of preemption reach the workers too; the run they serve decides when to stop."""
    for number in signals("SIGINT", "SIGUSR1"):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def room_in_shared_memory():
    """Where shared memory is full, a UserError says what helps."""
    try:
        yield
    except RuntimeError as error:
        if "No space left" not in str(error):
            raise
        raise UserError(
            "there is too little shared memory (/dev/shm) for the data workers: take --workers 0, or give more, as by "
            "docker run --shm-size 8g"
        ) from error


class Stream(IterableDataset):
    """A source's training batches for one rank. Worker k of n makes batches k, k + n, …, so their order stays fixed."""

    def __init__(self, source, first, *share):
        self.source = source
        self.first = first
        self.share = share  # batch of this rank, rank, number of ranks

    def __iter__(self):
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in self.source.batches(range(self.first + offset, 2**62, stride), *self.share):
            if worker:  # the queue would do it as well, but in a thread, whose errors reach nobody
                with room_in_shared_memory():
                    batch.images.share_memory_()
            yield batch
