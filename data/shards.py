"""WebDataset shards, as img2dataset writes them: `key.jpg`, `key.txt` and `key.json` in 00000.tar, 00001.tar, …

webdataset's own reader is not used: it ends a key at the first period of a name, does not count what it skips, and
cannot resume a stream.
"""

import collections
import contextlib
import gzip
import itertools
import math
import operator
import os
import subprocess
import tarfile
import tempfile
import zlib

import numpy as np

from common.cli import UserError, first_line
from data.folder import is_hidden
from data.pairs import DUPLICATE, IMAGE_SUFFIXES, MAX_FILE, SHARD, SUFFIXES, Sample
from data.sources import FEWEST, JSON_UNREAD, Source

TRIED, SAMPLES_TRIED = 5, 300  # shards, and samples of each, that are read when a source is opened
LANES = 8  # shards that are read in turn
BUFFER, BUFFER_BYTES = 2048, 2**27  # most samples in the shuffle buffer, and their most bytes
BLOCK = 2**17  # samples after which a stream starts anew
LEFT_OUT = 2**14  # most samples of each lane that are left out at its start
ERRORS = (OSError, EOFError, ValueError, OverflowError, tarfile.TarError, zlib.error)  # what reading a shard may raise
GZIP = b"\x1f\x8b"  # first bytes of a compressed shard


class Shards(Source):
    """A list of shards: files, or commands that write one to their output (`pipe:COMMAND`).

    Each rank and worker reads an endless stream: random shards from front to back, LANES in turn, shuffled in a buffer
    that is full before the first batch.

    After a block of samples a stream starts anew, with a seed made of the run's, the block's and its own. A resumed run
    continues exactly if ranks, workers and batch are the same, and decodes nothing of the block's earlier batches.

    Shards that cannot be read or contain no usable sample are skipped. A hash of the picture holds out one sample in
    50; of fewer than 200 samples, none.
    """

    def __init__(self, urls, resolution, seed, caption_key=None):
        self.urls, self.missing = [], []
        for url in urls:
            (self.urls if command_of(url) or os.path.isfile(url) else self.missing).append(url)
        if 2 * len(self.missing) > len(urls):
            forms = "write several as data/{00000..00041}.tar, and what is not a file as pipe:COMMAND"
            raise UserError(f"--data: no such shard: {self.missing[0]}; {forms}")
        name = urls[0] if len(urls) == 1 else f"{urls[0]} … {urls[-1]}"
        super().__init__(name, resolution, seed, caption_key)
        self.check(self.look())

    def look(self):
        """Reads the first samples of some shards to learn what they contain → whether one is usable for training."""
        self.kinds, self.complete, self.alone = collections.Counter(), 0, 0
        number, reached_ends, usable = 0, True, set()  # whether usable ones would be held out
        tried = self.urls[:: -(-len(self.urls) // TRIED)]
        for url in tried:
            count = 0
            for sample in itertools.islice(self.raw(url), SAMPLES_TRIED):
                count += 1
                self.kinds.update(suffix or "no suffix" for suffix in sample.parts)
                if sample.image:
                    has_caption = (".json" if self.caption_key else ".txt") in sample.parts
                    self.complete += has_caption
                    self.alone += not has_caption
                if False not in usable and self.example(sample):
                    usable.add(self.is_for(sample, held_out=True))
            number += count
            reached_ends = reached_ends and count < SAMPLES_TRIED
        self.number = number * len(self.urls) // len(tried) if reached_ends else math.inf  # estimate of all samples
        self.holds_out = self.number >= FEWEST
        return False in usable or (True in usable and not self.holds_out)

    def findings(self):
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common(8))
        yield f"{len(self.urls)} shard(s) from {self.urls[0]}. Of {self.kinds.total()} files seen: {kinds or 'none'};"
        yield f"among them {self.complete} images with a caption and {self.alone} without."
        if self.missing:
            yield f"{len(self.missing)} shard(s) do not exist, such as {self.missing[0]}."
        if self.alone and self.kinds[".json"] and not self.caption_key:
            yield JSON_UNREAD

    def raw(self, url):
        """Samples of a shard, not decoded; up to where it is unreadable."""
        try:
            for key, files in itertools.groupby(members(url), operator.itemgetter(0)):
                parts = {}
                for _, suffix, data in files:
                    is_further = suffix.endswith(IMAGE_SUFFIXES) and not parts.keys().isdisjoint(IMAGE_SUFFIXES)
                    if suffix in parts or is_further:
                        self.skips.skip(DUPLICATE, f"{key}{suffix} in {url}")
                    else:
                        parts[suffix] = data
                self.skips.failing_since = None
                yield Sample(f"{key} in {url}", parts)
        except ERRORS as error:
            self.skips.fail(SHARD, f"{url}: {first_line(error)}")

    def lane(self, rng):
        """Endless samples of whole shards in random order. A random number of samples is read and left out first, so
        that the first ones of a shard are not more likely than others.
        """
        shards = (self.raw(self.urls[rng.integers(len(self.urls))]) for _ in itertools.count())
        return itertools.islice(itertools.chain.from_iterable(shards), rng.integers(min(LEFT_OUT, self.number)), None)

    def random_samples(self, rng):
        """Endless samples of random shards."""
        lanes = [self.lane(own) for own in rng.spawn(min(LANES, len(self.urls)))]
        return (next(lane) for lane in itertools.cycle(lanes))

    def block(self, done, batch, *seed):
        """Endless batches of one block from number `done` on.

        Batch k starts at sample k · batch, so earlier samples are not decoded. An unusable sample is replaced by the
        first one after the batch, which the next batch then contains too.
        """
        rng = np.random.default_rng([self.seed, *seed])
        chosen = (sample for sample in self.random_samples(rng) if self.is_for(sample, held_out=False))
        mixed = shuffled(chosen, np.random.default_rng([self.seed, *seed, 1]), min(BUFFER, self.number))
        stream = itertools.islice(mixed, done * batch, None)
        ahead = []  # the examples from the start of the batch, None for unusable ones
        for number in itertools.count(done):
            while len(examples := [example for example in ahead if example]) < batch:
                ahead.append(self.example(next(stream)))
            yield self.collate(examples[:batch], np.random.default_rng([self.seed, *seed, 2, number]))
            del ahead[:batch]

    def batches(self, steps, batch, rank, world_size):
        worker, workers = steps.start % steps.step, steps.step  # a resumed run may begin at any step
        length = max(1, BLOCK // batch)  # of a block, in batches of this worker
        first, done = divmod(steps.start // workers, length)
        for number in itertools.count(first):
            made = self.block(done, batch, number, rank, world_size, worker, workers)
            yield from itertools.islice(made, length - done)
            done = 0

    def examples(self, held_out=False, rank=0, world_size=1):
        """Each rank reads its own shards. With fewer shards than ranks each reads all, and decodes its share."""
        shared = len(self.urls) < world_size
        samples = itertools.chain.from_iterable(map(self.raw, self.urls if shared else self.urls[rank::world_size]))
        wanted = (sample for sample in samples if self.is_for(sample, held_out))
        share = itertools.islice(wanted, rank, None, world_size) if shared else wanted
        return filter(None, map(self.example, share))


def shuffled(samples, rng, most):
    """Shuffles endless samples in a buffer of up to `most`, which is full before the first one is yielded."""
    buffer, size = [], 0
    for sample in samples:
        buffer.append(sample)
        size += sample.size
        while len(buffer) >= most or size > BUFFER_BYTES:
            at = rng.integers(len(buffer))
            buffer[at], buffer[-1] = buffer[-1], buffer[at]
            size -= buffer[-1].size
            yield buffer.pop()


def command_of(url):
    """The shell's command that writes a shard to its output; None for a file on the disk."""
    return url.removeprefix("pipe:") if url.startswith("pipe:") else None


@contextlib.contextmanager
def output_of(command):
    """What a command writes, as a file. If the reader finds no whole tar, raises OSError with the command's message."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, shell=True, stderr=errors, start_new_session=True, **streams)
        try:
            yield process.stdout
        except tarfile.TarError as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            errors.seek(0)
            said = errors.read(10_000).decode(errors="replace").strip()
            raise OSError(said.splitlines()[-1][:200] if said else first_line(error)) from error
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


@contextlib.contextmanager
def opened(url):
    """A shard as a TarFile, to be read from the front."""
    command = command_of(url)
    with output_of(command) if command else open(url, "rb") as file:
        if file.peek().startswith(GZIP):
            file = gzip.open(file)  # noqa: SIM115 - unlike tarfile, it reads several streams in one file
        with tarfile.open(fileobj=file, mode="r|") as tar:
            tar.ignore_zeros = True  # after the first header, damaged ones and the end of a first tar are skipped
            yield tar


def members(url):
    """Yields (key, suffix, bytes) of the files in a shard, without hidden ones, see content. Raises one of ERRORS.

    The key is the name without its last suffix; but after a file of the key 0, such as 0.jpg, 0.mask.png also has the
    key 0, and the suffix .mask.png. (So 0.5.jpg right after the sample 0 is taken for a further image of it.)
    """
    former, end = "", None  # the former file's key; the place after it
    with opened(url) as tar:
        for info in iter(tar.next, None):
            tar.members, end = [], tar.offset  # else it keeps all members in memory
            if info.isdir() or any(map(is_hidden, info.name.split("/"))):
                continue
            folder, _, name = info.name.rpartition("/")
            stem, _, suffix = name.rpartition(".")
            key, suffix = f"{folder}/{stem or name}".lstrip("/"), f".{suffix}".lower() if stem else ""
            if former and key.startswith(f"{former}."):
                key, suffix = former, key[len(former) :].lower() + suffix
            former = key
            yield key, suffix, content(tar, info, suffix)
        # tarfile takes half a header for the end, and does not ask for the empty blocks that end a tar.
        if tar.fileobj.tell() % tarfile.BLOCKSIZE or tar.offset == end:
            raise tarfile.ReadError("unexpected end of data")


def content(tar, info, suffix):
    """The bytes of a file, up to MAX_FILE; None for a link, a sparse file (not in one piece), and a kind that is not
    read.
    """
    if not info.isreg() or info.issparse() or f".{suffix.rpartition('.')[2]}" not in SUFFIXES:
        return None
    size = min(info.size, MAX_FILE)
    tar.fileobj.seek(info.offset_data)  # several times as fast as extractfile
    data = tar.fileobj.read(size)
    if len(data) < size:
        raise tarfile.ReadError("unexpected end of data")
    return data
