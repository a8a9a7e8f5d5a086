"""What all sources of captioned images share: the batch, which pairs are held out, and patience with a failing disk."""

import collections
import hashlib
import itertools
import time
from typing import NamedTuple

import numpy as np
import torch

from common.cli import UserError, first_line

HELD_OUT_OF = 50  # one pair in so many is held out for evaluation
FEWEST = 200  # pairs; of fewer none is held out
AT_ONCE = 20  # failures in a row that are passed over at once: some shards may be missing for good
PAUSES = (1, 2, 4, 8, 16, 32, 64)  # seconds to wait after each further one; shorter together than a worker may take


class Batch(NamedTuple):
    images: torch.Tensor  # [b, 3, R, R] in [−1, 1]
    captions: list[str]
    skipped: collections.Counter  # the pairs passed over on the way, by cause


class Stopped(Exception):
    """The run was asked to stop while it waited for data."""


def sample_indices(step, batch, rank, world_size):
    """The numbers, counted over the whole run and all ranks, of the samples that a rank sees in a step."""
    first = (step * world_size + rank) * batch
    return range(first, first + batch)


def collate(examples, rng, tally):
    """Some (image, captions) → a Batch, for each image one of its captions."""
    images, captions = zip(*examples, strict=True)
    return Batch(torch.stack(images), [lines[rng.integers(len(lines))] for lines in captions], tally.take())


def collated(examples, batch, rng, tally):
    """An iterator of examples → one of Batches; the last may be smaller."""
    while some := list(itertools.islice(examples, batch)):
        yield collate(some, rng, tally)


class Evaluated:
    """The evaluation of a source that has `examples(held_out, rank, world_size)`, a seed and a tally.

    A rank takes every world_size-th example, and decodes no others.
    """

    def evaluation(self, batch=64, held_out=False, rank=0, world_size=1):
        """Batches of every pair that can be used, once; held_out: of those alone that training never sees."""
        examples = with_one_caption(self.examples(held_out, rank, world_size), self.seed, rank, world_size)
        return collated(examples, batch, np.random.default_rng(self.seed), self.tally)

    def evaluation_pairs(self, batch=64, rank=0, world_size=1):
        """Batches of the pairs to evaluate with: those held out first, then those of training."""
        held_out, others = (self.evaluation(batch, part, rank, world_size) for part in (True, False))
        return itertools.chain(held_out, others)


def with_one_caption(examples, seed, rank, world_size):
    """A rank's share of (image, captions) → with one caption each, the same on any number of ranks."""
    for number, (image, captions) in enumerate(examples):
        rng = np.random.default_rng([seed, rank + number * world_size])
        yield image, [captions[rng.integers(len(captions))]]


def is_held_out(key):
    """Whether the pair of this name is held out, by a hash of the name alone: today, tomorrow, in any company."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8]) % HELD_OUT_OF == 0


class Patience:
    """Waits, ever longer, for a source that fails again and again, and at last gives up."""

    def __init__(self, name):
        self.name = name
        self.failures = 0  # in a row
        self.first, self.since = "", 0.0  # the first of them, and when
        self.asked_to_stop = lambda: False

    def __getstate__(self):
        return {**vars(self), "asked_to_stop": None}  # a worker is ended from outside

    def __setstate__(self, state):
        vars(self).update(state, asked_to_stop=lambda: False)

    def succeed(self):
        self.failures = 0

    def fail(self, error):
        """Waits if that may help. Raises UserError with the first error, or Stopped."""
        if not self.failures:
            self.first, self.since = first_line(error), time.monotonic()
        self.failures += 1
        elapsed, number = time.monotonic() - self.since, self.failures - AT_ONCE - 1
        if number >= len(PAUSES) or (elapsed > sum(PAUSES) and self.failures > 2):  # a failure itself may take a minute
            raise UserError(f"--data {self.name}: for {elapsed:.0f} s nothing could be read: {self.first}")
        if number >= 0:
            until = time.monotonic() + PAUSES[number]
            while time.monotonic() < until:
                if self.asked_to_stop():
                    raise Stopped
                time.sleep(min(0.2, PAUSES[number]))
