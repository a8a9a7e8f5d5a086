"""WebDataset shards, as img2dataset writes them: `key.jpg`, `key.txt` and `key.json` in 00000.tar, 00001.tar, …"""

import collections
import itertools
import os

import numpy as np

from common.cli import UserError, first_line
from data import members
from data.batches import FEWEST, Evaluated, Patience, collate, is_held_out
from data.pairs import (
    IMAGE_SUFFIXES,
    LARGE,
    MAX_FILE,
    NO_CAPTION,
    NO_IMAGE,
    SHARD,
    Tally,
    Unusable,
    facts_of,
    read_pair,
    where,
)

BLOCK = 10_000  # samples after which a stream starts anew, from another seed; img2dataset's shards hold as many
BUFFER = 1000  # samples that a stream shuffles
TRIED = 5  # shards, after which a source of which none can be read is refused at the start
LOOKED_AT = 1000  # files of the first shards by which a source says what it holds


class Shards(Evaluated):
    """A list of shards, on a disk, behind URLs, or as commands, `pipe:COMMAND`.

    A stream, of one rank and worker, is endless. It draws shards with replacement, reads each from a random place on
    and around, and shuffles what it holds, so that every sample comes about equally often. After BLOCK samples it does
    so anew, under a seed made of the run's, the block's and its own: a resumed run need not read what came before the
    block it is in, and of that block it decodes nothing before its batch. It sees what the uninterrupted one would have
    seen, if ranks, workers and the batch are as many.

    What a command writes can only be read from its front. There a block first passes over up to BLOCK samples. Shards
    of at most BLOCK samples are seen whole, of larger ones the ends are not.

    Where a .json has a field `held_out`, that says which samples are held out. Elsewhere a hash of the key does, for
    one in 50; with fewer than 200 samples, none.
    """

    def __init__(self, urls, resolution, seed, caption_key=None):
        self.urls, self.resolution, self.seed, self.caption_key = urls, resolution, seed, caption_key
        name = urls[0] if len(urls) == 1 else f"{urls[0]} … {urls[-1]}"
        self.tally, self.patience = Tally(name), Patience(name)
        if missing := [u for u in urls if members.is_file(u) and not os.path.isfile(members.local(u))]:
            raise UserError(f"--data: no such shard: {missing[0]}")
        self.from_anywhere = all(map(members.is_file, urls))
        self.look()
        if next(self.examples(), None) is None:
            causes = self.tally.told(self.tally.take()) or "they hold none"
            raise UserError(
                f"--data: not one usable pair of an image and a caption in {len(urls)} shard(s) from {urls[0]}: "
                f"{causes}. {' '.join(self.describe())}"
            )
        self.tally.take()

    def look(self):
        """Learns from the first files in the shards what kinds there are, and how samples are held out.

        Raises UserError where none of the first shards can be read.
        """
        found = []
        for number, url in enumerate(self.urls):
            if number == TRIED and not found:
                break
            some = itertools.islice(members.members(url), LOOKED_AT - len(found))
            found += [((url, key), *rest) for key, *rest in self.readable(some, url, patient=False)]
            if len(found) == LOOKED_AT:
                break
        if not found and (causes := self.tally.told(self.tally.take())):
            raise UserError(f"--data: not one usable pair in {len(self.urls)} shard(s) from {self.urls[0]}: {causes}")
        self.kinds = collections.Counter(suffix or "no suffix" for _, suffix, _ in found)
        self.fields = sorted({field for _, suffix, data in found if suffix == ".json" for field in facts_of(data)})
        self.names_held_out = "aurora_held_out" in self.fields
        number = len({key for key, *_ in found})
        self.holds_out = self.names_held_out or number >= FEWEST or len(found) == LOOKED_AT
        images, captions = ({k for k, suffix, _ in found if suffix in kinds} for kinds in self.wanted[:2])
        self.looked_at = len(images & captions), len(images - captions)

    @property
    def wanted(self):
        """The suffixes of which a complete sample has one, of each kind."""
        caption = (".json",) if self.caption_key else (".txt",)
        return (IMAGE_SUFFIXES, caption, (".json",)) if self.names_held_out else (IMAGE_SUFFIXES, caption)

    def describe(self):
        """What the shards hold, in lines for the user."""
        pairs, alone = self.looked_at
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common(8))
        yield f"{len(self.urls)} shard(s) from {self.urls[0]}. The first {self.kinds.total()} files: {kinds or 'none'};"
        yield f"among them {pairs} images with a caption and {alone} without."
        read = {*IMAGE_SUFFIXES, ".txt", ".json"}
        if others := [kind for kind in self.kinds if kind not in read]:
            yield f"Not read: {', '.join(others[:8])}."
        if not pairs and self.fields:
            yield f"The .json hold {', '.join(self.fields[:20])}; name the caption among these by --caption-key."
        if self.names_held_out:
            yield "Held out for evaluation is what their .json says."
        elif self.holds_out:
            yield "One pair in 50 is held out for evaluation."
        else:
            yield f"None is held out for evaluation, as there are fewer than {FEWEST}: it sees what training sees."

    # ------------------------------------------------------------------------------------------------------------------
    # From shards to samples.

    def readable(self, found, url, patient=True):
        """What comes from a shard, up to where it cannot be read; that is counted, and waited for if need be."""
        try:
            for item in found:
                self.patience.succeed()
                yield item
        except members.ERRORS as error:
            self.tally.skip(SHARD, f"{url}: {first_line(error)}")
            if patient:
                self.patience.fail(OSError(f"{url}: {first_line(error)}"))

    def raw(self, url, start=0.0):
        """The samples of a shard, (key, {suffix: bytes})."""
        found = self.readable(members.members(url, start), url)
        return members.samples(found, self.tally, self.wanted)

    def drawn(self, rng):
        """Endless samples of shards drawn at random, each read from a random place on."""
        while True:
            yield from self.raw(self.urls[rng.integers(len(self.urls))], rng.random())

    def is_for(self, sample, held_out):
        """Whether a sample is of the part that is held out, or of the other."""
        key, parts = sample
        if self.names_held_out:
            return bool(facts_of(parts.get(".json")).get("aurora_held_out")) == held_out
        return (self.holds_out and is_held_out(key)) == held_out

    def example(self, sample):
        """(image [3, R, R], captions) of a sample, or None, and counted, where it cannot be used."""
        key, parts = sample
        image = next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None)
        text, facts = parts.get(".txt"), parts.get(".json")
        try:
            if image is not None and len(image) == MAX_FILE:
                raise Unusable(LARGE)
            example = read_pair(image, text, facts, self.resolution, self.caption_key)
        except Unusable as error:
            if str(error) in (NO_CAPTION, NO_IMAGE) and image is None and text is None:
                return None  # a file of another kind, or a .json of its own
            self.tally.skip(str(error), where(str(error), key, facts))
            return None
        self.tally.use()
        return example

    # ------------------------------------------------------------------------------------------------------------------
    # Training.

    def block(self, done, batch, *seed):
        """The batches of one block from number `done` on, an endless iterator.

        Batch k begins at sample k · batch, so nothing before it need be decoded. A sample that cannot be used is
        replaced by the first one after the batch, which the next batch then sees as well.
        """
        rng = np.random.default_rng([self.seed, *seed])
        samples = self.drawn(rng)
        if not self.from_anywhere:
            samples = itertools.islice(samples, int(rng.integers(BLOCK)), None)
        chosen = (s for s in samples if self.is_for(s, held_out=False) and rng.random() < weight_of(s))
        stream = itertools.islice(shuffled(chosen, np.random.default_rng([self.seed, *seed, 1])), done * batch, None)
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

    # ------------------------------------------------------------------------------------------------------------------
    # Evaluation.

    def examples(self, held_out=False, rank=0, world_size=1):
        """Every pair that can be used, once; with held_out only the held-out ones."""
        samples = itertools.chain.from_iterable(map(self.raw, self.urls))
        wanted = (sample for sample in samples if self.is_for(sample, held_out))
        return filter(None, map(self.example, itertools.islice(wanted, rank, None, world_size)))


def shuffled(samples, rng):
    """Endless samples, out of their order within a buffer, which grows while the first ones are given out."""
    buffer = []
    for count, sample in enumerate(samples):
        buffer.append(sample)
        if len(buffer) >= BUFFER or (count >= BUFFER // 10 and count % 2):
            at = rng.integers(len(buffer))
            buffer[at], buffer[-1] = buffer[-1], buffer[at]
            yield buffer.pop()


def weight_of(sample):
    """The chance that a sample is taken where it is met: the `aurora_weight` in its .json, by default 1."""
    weight = facts_of(sample[1].get(".json")).get("aurora_weight", 1)
    return weight if isinstance(weight, int | float) else 1
