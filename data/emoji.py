"""The emoji: vector pictures by several artists with captions, in one shard. make_emoji.py made and explains it."""

import collections
import functools
import gzip
import tarfile
from pathlib import Path

import numpy as np

from data.pairs import Sample
from data.sources import Source

SHARD = Path(__file__).parent / "emoji.tar.gz"
GROUPED = 3 / 4  # the share of a batch whose pictures come in groups


def read_emoji():
    """All samples of the shard."""
    parts = collections.defaultdict(dict)
    with gzip.open(SHARD) as file, tarfile.open(fileobj=file) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            parts[key][f".{suffix}"] = tar.extractfile(member).read()
    return [Sample(f"{key} in {SHARD.name}", files) for key, files in parts.items()]


def captions_of(sample, styled=(True, False)):
    """A sample's captions: those that name its style, those that do not, or both."""
    style = f", {sample.facts['style']} style"
    lines = sample.parts[".txt"].decode().splitlines()
    return [line for line in lines if (style in line) in styled]


class Emoji(Source):
    """Every name is equally frequent for each artist who drew it, although people have up to 26 skin tones.

    group: so many pictures in a row of a training batch show one emoji, by different artists, and have one caption,
    which leaves the style open. An emoji with fewer pictures repeats them. The captions of the other pictures, a
    quarter of the batch, name the style. With a group of 1, pictures and captions are drawn independently.
    """

    def __init__(self, resolution, seed, group=1):
        super().__init__("emoji", resolution, seed)
        self.group, self.samples = group, read_emoji()
        self.pictures = [sample for sample in self.samples if self.is_for(sample, held_out=False)]
        self.emoji = collections.defaultdict(list)  # code: the pictures by its artists
        for sample in self.pictures:
            self.emoji[sample.facts["code"]].append(sample)

    def is_for(self, sample, held_out):
        return bool(sample.facts["aurora_held_out"]) == held_out

    def describe(self):
        held_out = len(self.samples) - len(self.pictures)
        yield f"{len(self.samples)} pictures of emoji, of which {held_out} are held out for evaluation."

    @functools.cached_property
    def weights(self):
        """How often each picture, and each group, is drawn; both sum to one."""
        pictures = np.array([sample.facts["aurora_weight"] for sample in self.pictures])
        groups = np.array([sum(sample.facts["aurora_weight"] for sample in some) for some in self.emoji.values()])
        return pictures / pictures.sum(), groups / groups.sum()

    def draw(self, size, rng):
        """`size` pictures for training, as pairs of a Sample and its caption."""
        of_pictures, of_groups = self.weights
        drawn, emoji = [], list(self.emoji.values())
        number = int(size * GROUPED) // self.group if self.group > 1 else 0
        for chosen in rng.choice(len(emoji), number, p=of_groups):
            pictures = emoji[chosen]
            caption = rng.choice(captions_of(pictures[0], styled=[False]))
            drawn += [(pictures[i], caption) for i in np.resize(rng.permutation(len(pictures)), self.group)]
        for chosen in rng.choice(len(self.pictures), size - len(drawn), p=of_pictures):
            picture = self.pictures[chosen]
            drawn.append((picture, rng.choice(captions_of(picture, [True] if number else (True, False)))))
        return drawn

    def batches(self, steps, batch, rank, world_size):
        for step in steps:
            drawn = self.draw(batch * world_size, np.random.default_rng([self.seed, step]))[rank * batch :][:batch]
            yield self.collate([(self.example(sample)[0], [str(caption)]) for sample, caption in drawn])

    def examples(self, held_out=False, rank=0, world_size=1):
        wanted = [sample for sample in self.samples if self.is_for(sample, held_out)]
        return map(self.example, wanted[rank::world_size])
