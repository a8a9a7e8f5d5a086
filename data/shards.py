"""WebDataset shards, as img2dataset writes them: `key.jpg`, `key.txt` and `key.json` in 00000.tar, 00001.tar, …

They are read here and not by webdataset's stages, which read a tar from its front alone and whole, end a key at the
first period of a name, and do not count what they pass over.
"""

import collections
import contextlib
import itertools
import math
import operator
import os
import select
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
    SHARD,
    Tally,
    Unusable,
    facts_of,
    read_pair,
    where,
)
from data.sources import FEWEST, Source, collate, is_held_out

TRIED, LOOKED_AT = 5, 300  # shards, and samples of each, by which a source says what it holds
STRETCH = 3  # samples, on average, that are read at once from a tar on a disk
LANES = 8  # shards that a stream reads in turn
BUFFER, BUFFER_BYTES = 2048, 2**27  # samples that a stream shuffles, and what they may take
BLOCK = 2**14  # samples after which a stream begins anew; more than the emoji are
FIRST_BYTE = 60  # seconds in which a command must begin to write
LONG_NAME = 8 * tarfile.BLOCKSIZE  # bytes that a name of over 100 characters may take before its file's header
LIMITS = {".txt": MAX_TEXT, ".json": MAX_FACTS} | dict.fromkeys(IMAGE_SUFFIXES, MAX_FILE)  # bytes that are read
ERRORS = (OSError, EOFError, tarfile.TarError, zlib.error)  # what reading a shard may raise
CURL = ["curl", "-sSfL", "--connect-timeout", "30", "--speed-limit", "1", "--speed-time", "60"]
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
        return sum(len(data) for data in self.parts.values() if data)


class Shards(Source):
    """A list of shards, on a disk, behind URLs, or as commands, `pipe:COMMAND`.

    A stream, of one rank and worker, is endless. It reads a few samples from a random place of a random shard, then of
    another, and shuffles them in a buffer that is full before the first batch: each sample comes about equally often,
    and the pairs of a batch come from as many shards. What is compressed, or comes from a command, is read whole from
    its front, LANES shards in turn.

    After BLOCK samples a stream begins anew, under a seed made of the run's, the block's and its own: a resumed run
    sees what an uninterrupted one would have seen, if ranks, workers and the batch are as many, and of what came before
    its batch in the block it decodes nothing.

    A shard that cannot be read, or holds nothing of use, is passed over. Our own emoji say in `aurora_held_out` which
    samples are held out, and in `aurora_weight` how often one is taken where it is met. Elsewhere a hash of the picture
    holds out one in 50; with fewer than 200 samples, none.
    """

    def __init__(self, urls, resolution, seed, caption_key=None):
        super().__init__(urls[0] if len(urls) == 1 else f"{urls[0]} … {urls[-1]}", resolution, seed, caption_key)
        self.urls = urls
        self.sizes = [size_of(url) for url in urls]  # None for a shard that is not there
        there = [url for url, size in zip(urls, self.sizes, strict=True) if size is not None]
        if 2 * len(there) < len(urls):
            raise UserError(f"--data: no such shard: {urls[self.sizes.index(None)]}")
        self.tally = Tally(self.name, len(there))
        usable = self.look(there[:: -(-len(there) // TRIED)])
        if not usable:
            raise UserError(
                f"--data: not one usable pair of an image and a caption in {len(urls)} shard(s) from {urls[0]}: "
                f"{self.tally.told() or 'they hold none'}. {' '.join(self.describe())}"
            )
        self.tally = Tally(self.name, len(there))

    def look(self, tried):
        """Learns from the first samples of some shards what they hold → whether one of them can be used."""
        self.kinds, self.fields, self.complete = collections.Counter(), set(), 0
        number, size, whole, usable = 0, 0, True, False
        images, others = set(), set()  # keys of images without a caption, and of what has no image
        for url in tried:
            count = 0
            for sample in itertools.islice(self.raw(url, patient=False), LOOKED_AT):
                count += 1
                size += sample.size + 1000 * len(sample.parts)  # with the headers, and what fills the last blocks
                self.kinds.update(suffix or "no suffix" for suffix in sample.parts)
                self.fields |= facts_of(sample.parts.get(".json")).keys()
                has_caption = (".json" if self.caption_key else ".txt") in sample.parts
                if sample.image and has_caption:
                    self.complete += 1
                else:
                    (images if sample.image else others).add(sample.key)
                usable = usable or self.example(sample) is not None
            number += count
            whole = whole and count < LOOKED_AT
        if len(images & others) > self.complete / 10:
            raise UserError(f"--data: in {tried[0]} the files of a sample lie apart; make it by tar --sort=name -cf")
        self.alone = len(images)
        self.names_held_out = "aurora_held_out" in self.fields
        self.number = number * len(self.urls) // len(tried) if whole else math.inf  # of samples, as it seems
        self.holds_out = self.names_held_out or self.number >= FEWEST
        self.finds_places = all(map(is_plain_tar, tried))
        self.stretch = STRETCH * size // max(number, 1)  # bytes
        return usable

    def describe(self):
        """What the shards hold, in lines for the user."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common(8))
        yield f"{len(self.urls)} shard(s) from {self.urls[0]}. Of {self.kinds.total()} files seen: {kinds or 'none'};"
        yield f"among them {self.complete} images with a caption and {self.alone} without."
        if missing := self.sizes.count(None):
            yield f"{missing} shard(s) are not there, as {self.urls[self.sizes.index(None)]}."
        if others := [kind for kind in self.kinds if kind not in LIMITS]:
            yield f"Not read: {', '.join(others[:8])}."
        if not self.complete and self.fields:
            fields = ", ".join(sorted(self.fields)[:20])
            yield f"The .json hold {fields}; name the caption among these by --caption-key."
        yield "Held out for evaluation is what their .json says." if self.names_held_out else self.said_of_held_out()

    # ------------------------------------------------------------------------------------------------------------------
    # Samples.

    def raw(self, url, start=0, stop=math.inf, patient=True):
        """The samples of a shard, or of its bytes from start to stop, none decoded, up to where it cannot be read."""
        try:
            for key, files in itertools.groupby(members(url, start, stop), operator.itemgetter(0)):
                parts = {}
                for _, suffix, data in files:
                    if suffix in parts:
                        self.tally.skip(DUPLICATE, f"{key}{suffix}", url)
                    parts.setdefault(suffix, data)
                self.patience.succeed()
                yield Sample(url, key, parts)
        except ERRORS as error:
            told = f"{url}: {first_line(error)}"
            self.tally.skip(SHARD, told, url)
            if patient:
                self.patience.fail(OSError(told))

    def places(self, rng):
        """Endless samples, a few from each of the places that are drawn at random from all shards' bytes.

        Places begin up to a stretch before a shard, so that its first samples are as likely as others.
        """
        ends = np.cumsum([size + self.stretch if size else 0 for size in self.sizes])
        while True:
            place = rng.integers(ends[-1])
            number = int(np.searchsorted(ends, place, "right"))
            start = int(place - ends[number]) + self.sizes[number]
            yield from self.raw(self.urls[number], max(0, start), start + self.stretch)

    def whole(self, rng):
        """Endless samples of whole shards in random order, beginning somewhere."""
        shards = (self.raw(self.urls[rng.integers(len(self.urls))]) for _ in itertools.count())
        return itertools.islice(itertools.chain.from_iterable(shards), rng.integers(min(BLOCK, self.number)), None)

    def drawn(self, rng):
        """Endless samples of random shards."""
        if self.finds_places:
            return self.places(rng)
        lanes = [self.whole(own) for own in rng.spawn(min(LANES, len(self.urls)))]
        return (next(lane) for lane in itertools.cycle(lanes))

    def is_for(self, sample, held_out):
        """Whether a sample is of the part that is held out, or of the other."""
        facts = facts_of(sample.parts.get(".json"))
        if self.names_held_out:
            return bool(facts.get("aurora_held_out")) == held_out
        return (self.holds_out and is_held_out(sample.image, facts)) == held_out

    def example(self, sample):
        """(image [3, R, R], captions) of a sample, or None, and counted, where it cannot be used."""
        text, facts = sample.parts.get(".txt"), sample.parts.get(".json")
        try:
            if any(suffix in LIMITS and data is None for suffix, data in sample.parts.items()):
                raise Unusable(LINK)
            if sample.image is None and text is None:
                return None  # a file of another kind, or a .json of its own
            example = read_pair(sample.image, text, facts, self.resolution, self.caption_key)
        except Unusable as error:
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
        mixed = shuffled(chosen, np.random.default_rng([self.seed, *seed, 1]), min(BUFFER, self.number))
        stream = itertools.islice(mixed, done * batch, None)
        ahead = []  # the examples from where the batch begins, None for those of no use
        for number in itertools.count(done):
            while len(examples := [example for example in ahead if example]) < batch:
                ahead.append(self.example(next(stream)))
            yield collate(examples[:batch], np.random.default_rng([self.seed, *seed, 2, number]), self.tally)
            del ahead[:batch]

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
        samples = itertools.chain.from_iterable(map(self.raw, self.urls if shared else self.urls[rank::world_size]))
        wanted = (sample for sample in samples if self.is_for(sample, held_out))
        share = itertools.islice(wanted, rank, None, world_size) if shared else wanted
        return filter(None, map(self.example, share))


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


def command_of(url):
    """The command that writes a shard to its output, or None for a file on the disk."""
    if url.startswith("pipe:"):
        return url.removeprefix("pipe:")
    before, after = FETCH.get(url.partition("://")[0], (None, None))
    return None if before is None else [*before, url, *after]


def local(url):
    return url.removeprefix("file://")


def size_of(url):
    """The bytes of a shard; 0 for what a command writes, None for a file that is not there."""
    if command_of(url):
        return 0
    return os.path.getsize(local(url)) if os.path.isfile(local(url)) else None


def is_plain_tar(url):
    """Whether a shard is a tar on a disk, not compressed: the only kind in which a place can be found."""
    if command_of(url):
        return False
    with open(local(url), "rb") as file:
        return file.read(tarfile.BLOCKSIZE)[257:262] == b"ustar"


@contextlib.contextmanager
def output_of(command):
    """What a command writes, as a file. Where that is no whole tar, raises OSError in the command's own words."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    with tempfile.TemporaryFile() as errors:
        shell = isinstance(command, str)
        process = subprocess.Popen(command, shell=shell, stderr=errors, start_new_session=True, **streams)
        try:
            if os.name == "posix" and not select.select([process.stdout], [], [], FIRST_BYTE)[0]:
                raise OSError(f"nothing came for {FIRST_BYTE} s")
            yield process.stdout
        except tarfile.TarError as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if status := process.wait(1):
                    errors.seek(0)
                    lines = errors.read(10_000).decode(errors="replace").strip().splitlines() or ["no word"]
                    raise OSError(f"{lines[-1][:200]} (exit status {status})") from error
            raise
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


@contextlib.contextmanager
def opened(url, start):
    """A shard as a TarFile, read from byte `start` on if it is a plain tar. It passes over what is no header."""
    plain, command = is_plain_tar(url), command_of(url)
    with output_of(command) if command else open(local(url), "rb") as file:
        if plain:
            file.seek(start // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE)
        with tarfile.open(fileobj=file, mode="r:" if plain else "r|*", ignore_zeros=plain and start > 0) as tar:
            tar.ignore_zeros = True  # but for the first header: where that is none, it is no tar
            yield tar


def members(url, start=0, stop=math.inf):
    """(key, suffix, bytes) of the files in a shard. The key is the name without its last suffix; behind a file of 0, as
    0.jpg, comes 0.mask.png as another one of 0. Of a link, and of a file that is no image, caption or .json, the bytes
    are None; of one that is too large they are cut.

    start, stop: give the samples that follow the first file at byte `start`, up to that of the first file at `stop`.
    So of stretches that follow each other each sample belongs to one, and is whole. Raises one of ERRORS.
    """
    first = last = None  # the keys of these two files
    former = ""
    with opened(url, max(0, start - LONG_NAME)) as tar:
        for info in iter(tar.next, None):
            tar.members = []  # else it remembers all
            folder, _, name = info.name.rpartition("/")
            is_link = info.islnk() or info.issym()
            if info.offset < start or not (info.isfile() or is_link) or name.startswith(".") or "__MACOSX" in folder:
                continue
            stem, _, suffix = name.rpartition(".")
            key, suffix = f"{folder}/{stem or name}".lstrip("/"), f".{suffix}".lower() if stem else ""
            if former and key.startswith(f"{former}."):
                key, suffix = former, key[len(former) :].lower() + suffix
            former, first = key, first or key
            if last is None and info.offset >= stop:
                last = key
            if last not in (None, key):
                return
            if start and (key == first or first.startswith(f"{key}.")):
                continue
            data, limit = None, LIMITS.get(suffix)
            if limit and not is_link:
                size = min(info.size, limit)
                tar.fileobj.seek(info.offset_data)  # several times as fast as extractfile
                data = tar.fileobj.read(size)
                if len(data) < size:
                    raise tarfile.ReadError("unexpected end of data")
            yield key, suffix, data
