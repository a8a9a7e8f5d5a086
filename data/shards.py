"""WebDataset shards, as img2dataset writes them: `key.jpg`, `key.txt` and `key.json` in 00000.tar, 00001.tar, …

They are read here and not by webdataset's stages, which read a tar from its front alone and whole, end a key at the
first period of a name, and do not count what they pass over.
"""

import collections
import contextlib
import gzip
import io
import itertools
import math
import os
import select
import signal
import subprocess
import tarfile
import tempfile
import zlib
from typing import NamedTuple

import numpy as np

from common.cli import UserError, first_line
from data.pairs import (
    DUPLICATE,
    IMAGE_SUFFIXES,
    LINK,
    MAX_FACTS,
    MAX_FILE,
    MAX_TEXT,
    NO_CAPTION,
    NO_IMAGE,
    SHARD,
    Tally,
    Unusable,
    facts_of,
    read_pair,
    where,
)
from data.sources import FEWEST, Source, collate, is_held_out

TRIED, LOOKED_AT = 5, 1000  # shards, and files of each, by which a source says what it holds
STRETCH = 3  # samples, on average, that are read at once from a shard on a disk
LANES = 8  # shards that a stream reads in turn
BUFFER, BUFFER_BYTES = 2048, 2**27  # samples that a stream shuffles, and what they may take
BLOCK = 10_000  # samples after which a stream begins anew
PENDING = 2**28  # bytes of incomplete samples that are kept for a part that comes later
READ_TIMEOUT = 60  # seconds in which a command must write something
HEADER = tarfile.BLOCKSIZE
LIMITS = {".txt": MAX_TEXT, ".json": MAX_FACTS} | dict.fromkeys(IMAGE_SUFFIXES, MAX_FILE)  # bytes that are read
ERRORS = (OSError, EOFError, tarfile.TarError, zlib.error)  # what reading a shard may raise
CURL = ["curl", "-sSfL", "--connect-timeout", "30"]
FETCH = {  # how a URL is read: the command, before the URL and after it
    **dict.fromkeys(("http", "https", "ftp"), (CURL, [])),
    "s3": (["aws", "s3", "cp"], ["-"]),
    "gs": (["gcloud", "storage", "cat"], []),
}


class Sample(NamedTuple):
    shard: str
    key: str
    parts: dict  # {suffix: bytes}; None for a link and for what is not read

    @property
    def image(self):
        return next((self.parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in self.parts), None)

    @property
    def size(self):
        return sum(map(len, filter(None, self.parts.values())))


class Shards(Source):
    """A list of shards, on a disk, behind URLs, or as commands, `pipe:COMMAND`.

    A stream, of one rank and worker, is endless. It reads a few samples from a random place of LANES random shards in
    turn, and shuffles them in a buffer that is full before the first batch: each sample comes about equally often, and
    the pairs of a batch come from as many shards. After BLOCK samples it begins anew, under a seed made of the run's,
    the block's and its own. A resumed run sees what an uninterrupted one would have seen, if ranks, workers and the
    batch are as many, and of what came before its batch in the block it decodes nothing.

    What a command writes, what is compressed, and shards in which the files of a sample lie apart can only be read from
    their front. There a lane reads whole shards, of the first one only what follows a random place.

    A shard that cannot be read, or holds nothing of use, is passed over. Our own emoji say in `aurora_held_out` which
    samples are held out, and in `aurora_weight` how often one is taken where it is met. Elsewhere a hash of the picture
    holds out one in 50; with fewer than 200 samples, none.
    """

    def __init__(self, urls, resolution, seed, caption_key=None):
        super().__init__(urls[0] if len(urls) == 1 else f"{urls[0]} … {urls[-1]}", resolution, seed, caption_key)
        self.urls, self.tally = urls, Tally(self.name, len(urls))
        self.missing = [url for url in urls if command_of(url) is None and not os.path.isfile(local(url))]
        if 2 * len(self.missing) > len(urls):
            raise UserError(f"--data: no such shard: {self.missing[0]}")
        there = [url for url in urls if url not in self.missing]
        tried = there[:: -(-len(there) // TRIED)]
        self.look(tried)
        met = (sample for url in tried for sample in itertools.islice(self.raw(url, patient=False), LOOKED_AT))
        usable = next(filter(None, map(self.example, met)), None)
        told, self.tally = self.tally.told(), Tally(self.name, len(urls))
        if usable is None:
            raise UserError(
                f"--data: not one usable pair of an image and a caption in {len(urls)} shard(s) from {urls[0]}: "
                f"{told or 'they hold none'}. {' '.join(self.describe())}"
            )

    def look(self, tried):
        """Learns from the first files of some shards what kinds there are, where they lie, and what is held out."""
        names, whole = [], True  # whether they are seen to their ends
        self.kinds, self.fields, size = collections.Counter(), set(), 0
        for url in tried:
            count = len(names)
            found = self.readable(members(url), url, self.tally, patient=False)
            for key, suffix, data, room in itertools.islice(found, LOOKED_AT):
                self.kinds[suffix or "no suffix"] += 1
                self.fields |= facts_of(data).keys() if suffix == ".json" else set()
                names.append(((url, key), suffix))
                size += room
            whole &= len(names) - count < LOOKED_AT
        self.names_held_out = "aurora_held_out" in self.fields
        keys, images, captions = (
            {key for key, suffix in names if suffix in kinds} for kinds in ({s for _, s in names}, *self.wanted[:2])
        )
        self.looked_at = len(images & captions), len(images - captions)
        self.number = len(keys) * len(self.urls) // len(tried) if whole else math.inf  # of the samples, as it seems
        runs = sum(1 for _ in itertools.groupby(names, lambda name: name[0]))  # more than keys where files lie apart
        self.lie_apart = runs > 1.5 * len(keys) or not images & captions
        self.stretches = None  # how many there are in all shards up to the end of each
        if not self.lie_apart and not any(map(read_from_front, self.urls)):
            self.stretch = HEADER * max(1, round(STRETCH * size / len(keys) / HEADER))  # bytes
            sizes = (0 if url in self.missing else os.path.getsize(local(url)) for url in self.urls)
            self.stretches = np.cumsum([-(-size // self.stretch) for size in sizes])
        self.holds_out, self.buffer = self.names_held_out or self.number >= FEWEST, min(self.number, BUFFER)

    @property
    def wanted(self):
        """The suffixes of which a complete sample has one, of each kind."""
        caption = (".json",) if self.caption_key else (".txt",)
        return (IMAGE_SUFFIXES, caption, (".json",)) if self.names_held_out else (IMAGE_SUFFIXES, caption)

    def describe(self):
        """What the shards hold, in lines for the user."""
        pairs, alone = self.looked_at
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common(8))
        yield f"{len(self.urls)} shard(s) from {self.urls[0]}. Of {self.kinds.total()} files seen: {kinds or 'none'};"
        yield f"among them {pairs} images with a caption and {alone} without."
        if self.missing:
            yield f"{len(self.missing)} shard(s) are not there, as {self.missing[0]}."
        if others := [kind for kind in self.kinds if kind not in LIMITS]:
            yield f"Not read: {', '.join(others[:8])}."
        if not pairs and self.fields:
            fields = ", ".join(sorted(self.fields)[:20])
            yield f"The .json hold {fields}; name the caption among these by --caption-key."
        yield "Held out for evaluation is what their .json says." if self.names_held_out else self.said_of_held_out()

    # ------------------------------------------------------------------------------------------------------------------
    # Samples.

    def readable(self, found, url, tally, patient=True):
        """What an iterator of a shard's contents gives before it fails; then the failure is counted."""
        try:
            for each in found:
                self.patience.succeed()
                yield each
        except ERRORS as error:
            told = f"{url}: {first_line(error)}"
            tally.skip(SHARD, told, url)
            if patient:
                self.patience.fail(OSError(told))

    def raw(self, url, start=0, stop=math.inf, tally=None, patient=True):
        """The samples of a shard that belong to its bytes from start to stop, none decoded."""
        tally = tally or self.tally
        found = self.readable(members(url, start, stop), url, tally, patient)
        return (Sample(url, *sample) for sample in samples(found, self.wanted, tally))

    def lane(self, rng):
        """Endless samples from places drawn at random."""
        if self.stretches is not None:
            while True:
                number = int(rng.integers(self.stretches[-1]))
                shard = int(np.searchsorted(self.stretches, number, "right"))
                start = self.stretch * (number - (int(self.stretches[shard - 1]) if shard else 0))
                yield from self.raw(self.urls[shard], start, start + self.stretch)
        shards = (self.urls[rng.integers(len(self.urls))] for _ in itertools.count())
        first = next(shards)
        if self.lie_apart or (size := unpacked_size(first)) is None:  # nobody knows where its middle is
            whole = itertools.chain.from_iterable(map(self.raw, itertools.chain([first], shards)))
            yield from itertools.islice(whole, int(rng.integers(min(BLOCK, self.number))), None)
        yield from self.raw(first, int(rng.integers(size)))
        yield from itertools.chain.from_iterable(map(self.raw, shards))

    def drawn(self, rng):
        """Endless samples, from several lanes in turn."""
        count = LANES if self.stretches is not None else min(LANES, len(self.urls))
        return (next(lane) for lane in itertools.cycle([self.lane(own) for own in rng.spawn(count)]))

    def is_for(self, sample, held_out):
        """Whether a sample is of the part that is held out, or of the other."""
        facts = facts_of(sample.parts.get(".json"))
        if self.names_held_out:
            return bool(facts.get("aurora_held_out")) == held_out
        return (self.holds_out and is_held_out(sample.image, facts)) == held_out

    def example(self, sample):
        """(image [3, R, R], captions) of a sample, or None, and counted, where it cannot be used."""
        text, facts = (sample.parts.get(suffix) for suffix in (".txt", ".json"))
        try:
            if any(suffix in LIMITS and data is None for suffix, data in sample.parts.items()):
                raise Unusable(LINK)
            example = read_pair(sample.image, text, facts, self.resolution, self.caption_key)
        except Unusable as error:
            if str(error) in (NO_CAPTION, NO_IMAGE) and sample.image is None and text is None:
                return None  # a file of another kind, or a .json of its own
            self.tally.skip(str(error), where(str(error), f"{sample.key} in {sample.shard}", facts), sample.shard)
            return None
        self.tally.use(sample.shard)
        return example

    # ------------------------------------------------------------------------------------------------------------------
    # Training and evaluation.

    def block(self, done, batch, *seed):
        """The batches of one block from number `done` on, an endless iterator.

        Batch k begins at sample k · batch, so nothing before it need be decoded. A sample that cannot be used is
        replaced by the first one after the batch, which the next batch then sees as well.
        """
        rng = np.random.default_rng([self.seed, *seed])
        chosen = (s for s in self.drawn(rng) if self.is_for(s, held_out=False) and rng.random() < weight_of(s))
        mixed = shuffled(chosen, np.random.default_rng([self.seed, *seed, 1]), self.buffer)
        stream = itertools.islice(mixed, done * batch, None)
        ahead = collections.deque()  # the examples from where the batch begins, None for those of no use
        for number in itertools.count(done):
            usable = sum(example is not None for example in ahead)
            while usable < batch:
                ahead.append(self.example(next(stream)))
                usable += ahead[-1] is not None
            examples = itertools.islice((example for example in ahead if example), batch)
            yield collate(list(examples), np.random.default_rng([self.seed, *seed, 2, number]), self.tally)
            for _ in range(batch):
                ahead.popleft()

    def batches(self, steps, batch, rank, world_size):
        worker, workers = steps.start % steps.step, steps.step  # also after it began at another step
        length = max(1, BLOCK // batch)  # of a block, in batches of this worker
        first, done = divmod(steps.start // workers, length)
        for number in itertools.count(first):
            made = self.block(done, batch, number, rank, world_size, worker, workers)
            yield from itertools.islice(made, length - done)
            done = 0

    def examples(self, held_out=False, rank=0, world_size=1):
        """Every pair that can be used, once. A rank reads shards of its own, or of fewer shards than ranks all."""
        shared = len(self.urls) < world_size
        urls = self.urls if shared else self.urls[rank::world_size]
        tally = Tally(self.name) if shared and rank else self.tally  # what all ranks meet is counted once
        wanted = (sample for url in urls for sample in self.raw(url, tally=tally) if self.is_for(sample, held_out))
        return filter(None, map(self.example, itertools.islice(wanted, rank, None, world_size) if shared else wanted))


def shuffled(samples, rng, most):
    """Endless samples, out of their order within a buffer of up to `most`, which is full before the first comes out."""
    buffer, size = [], 0
    for sample in samples:
        buffer.append(sample)
        size += sample.size
        while len(buffer) >= most or size > BUFFER_BYTES:
            at = rng.integers(len(buffer))
            buffer[at], buffer[-1] = buffer[-1], buffer[at]
            size -= buffer[-1].size
            yield buffer.pop()


def weight_of(sample):
    """The chance that a sample is taken where it is met: `aurora_weight` in its .json, by default 1."""
    weight = facts_of(sample.parts.get(".json")).get("aurora_weight", 1)
    return weight if isinstance(weight, int | float) and 0 < weight <= 1 else 1


# ----------------------------------------------------------------------------------------------------------------------
# Tar files, from a disk, a web server or a command.


class Piped(io.RawIOBase):
    """What a command writes, as a file. Raises OSError, in the command's own words, where it fails or falls silent."""

    def __init__(self, command):
        self.process, self.errors = None, tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        own_group = os.name == "posix"  # so that what a shell starts can be ended with it
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": self.errors}
        try:
            shell = isinstance(command, str)
            self.process = subprocess.Popen(command, shell=shell, bufsize=0, start_new_session=own_group, **streams)
        except FileNotFoundError as error:
            raise OSError(f"there is no command {command[0]} here") from error

    def readable(self):
        return True

    def readinto(self, buffer):
        if os.name == "posix" and not select.select([self.process.stdout], [], [], READ_TIMEOUT)[0]:
            raise OSError(f"nothing came for {READ_TIMEOUT} s")
        count = self.process.stdout.readinto(buffer)
        if count == 0 and (status := self.process.wait()) != 0:
            self.errors.seek(0)
            lines = self.errors.read(10_000).decode(errors="replace").strip().splitlines() or ["no word"]
            raise OSError(f"{lines[-1][:200]} (exit status {status})")
        return count

    def close(self):
        if self.process and not self.closed:
            if self.process.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(self.process.pid, signal.SIGKILL) if os.name == "posix" else self.process.kill()
            self.process.stdout.close()
            self.process.wait()
        self.errors.close()
        super().close()


def command_of(url):
    """The command that writes a shard to its output, or None for a file on the disk."""
    if url.startswith("pipe:"):
        return url.removeprefix("pipe:")
    before, after = FETCH.get(url.partition("://")[0], (None, None))
    return None if before is None else [*before, url, *after]


def local(url):
    return url.removeprefix("file://")


def is_packed(url):
    with open(local(url), "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def read_from_front(url):
    """Whether only reading all that comes before leads to a place in a shard."""
    return command_of(url) is not None or (os.path.isfile(local(url)) and is_packed(url))


def unpacked_size(url):
    """Bytes of a shard on a disk, as far as gzip tells, which counts to 4 GiB; None for what a command writes."""
    if command_of(url) is not None or not os.path.isfile(local(url)):
        return None
    if not is_packed(url):
        return os.path.getsize(local(url))
    with open(local(url), "rb") as file:
        file.seek(-4, os.SEEK_END)
        return int.from_bytes(file.read(4), "little")


@contextlib.contextmanager
def opened(url):
    """A shard, as a binary file and the mode in which tarfile is to read it."""
    if command := command_of(url):
        with io.BufferedReader(Piped(command), 2**20) as file:
            yield file, "r|*"
    else:
        with gzip.open(local(url)) if is_packed(url) else open(local(url), "rb") as file:
            yield file, "r:"


def aligned(file, offset):
    """Moves to the first header at `offset` or after it → whether there is one: each header has a checksum."""
    file.seek(offset // HEADER * HEADER)
    while len(block := file.read(HEADER)) == HEADER:
        with contextlib.suppress(tarfile.HeaderError):
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            file.seek(-HEADER, os.SEEK_CUR)
            return True
    return False


def members(url, start=0, stop=math.inf):
    """(key, suffix, bytes, room in the tar) of the files of the samples that belong to a shard's bytes from start to
    stop; of stretches that follow each other, each sample belongs to one.

    The key is the name without its last suffix. Of a link, and of a file that is no image, caption or .json, the bytes
    are None, of one that is too large they are cut. Raises one of ERRORS.

    The file after the first whose header is at `start` or behind it belongs, with its sample, to the stretch before: of
    that first one a part may be missing, as long names stand in a header of their own.
    """
    with opened(url) as (file, mode):
        if start and not aligned(file, start):
            return
        with tarfile.open(fileobj=file, mode=mode) as tar:
            before = after = None  # keys of the samples at `start` and `stop`
            last = None  # number of the file that `after` is the key of
            for number, info in enumerate(iter(tar.next, None)):
                tar.members = []  # else it remembers all
                folder, _, name = info.name.rpartition("/")
                stem, _, suffix = name.rpartition(".")
                key, suffix = f"{folder}/{stem or name}".lstrip("/"), f".{suffix}".lower() if stem else ""
                if number == last:
                    after = key
                elif last is None and info.offset_data > stop:
                    last = number + 1
                if after not in (None, key):
                    return
                if start and number < 2:
                    before = key
                if key == before:
                    continue
                before = None
                is_link = info.islnk() or info.issym()
                if not (info.isfile() or is_link) or name.startswith(".") or "__MACOSX" in folder:
                    continue
                limit = LIMITS.get(suffix)
                data = tar.extractfile(info).read(limit) if limit and not is_link else None
                yield key, suffix, data, HEADER * (1 - -info.size // HEADER)
            if mode == "r:":
                file.seek(tar.offset)
                if any(file.read(HEADER)):  # tarfile takes a broken header for the end
                    raise tarfile.ReadError(f"no header at byte {tar.offset}")


def samples(found, wanted, tally):
    """Members → samples (key, {suffix: bytes}), each as soon as it is complete and the next has begun.

    A sample's files may lie apart: first all images, then all captions. wanted: suffixes of which each sample has one;
    a tuple of tuples. Incomplete ones come at the end, or when they take more than PENDING bytes.
    """
    pending, size, last = {}, 0, None

    def complete(parts):
        return all(any(suffix in parts for suffix in kinds) for kinds in wanted)

    def taken(key):
        parts = pending.pop(key)
        return key, parts, sum(map(len, filter(None, parts.values())))

    for key, suffix, data, _ in found:
        if last in pending and key != last and complete(pending[last]):
            *sample, freed = taken(last)
            size -= freed
            yield sample
        last = key
        parts = pending.setdefault(key, {})
        if suffix in parts:
            tally.skip(DUPLICATE, f"{key}{suffix}")
            continue
        parts[suffix] = data
        size += len(data or b"")
        while size > PENDING and len(pending) > 1:
            *sample, freed = taken(next(iter(pending)))
            size -= freed
            yield sample
    for key in list(pending):
        yield taken(key)[:2]
