"""A folder of images, with a caption beside each."""

import collections
import errno
import functools
import itertools
import os
import stat
from pathlib import Path

import numpy as np

from common.cli import UserError
from data.batches import FEWEST, Evaluated, Patience, collate, is_held_out, sample_indices
from data.pairs import (
    FILE,
    IMAGE_SUFFIXES,
    LARGE,
    MAX_FACTS,
    MAX_FILE,
    MAX_TEXT,
    Tally,
    Unusable,
    facts_of,
    read_pair,
    where,
)


class Search:
    """The images in a folder and all below it, and the captions beside them."""

    def __init__(self, path, caption_key=None):
        self.caption_key = caption_key
        self.pairs, self.without_caption = [], []  # (image, the file of its caption), and images alone
        self.others = collections.Counter()  # files that are neither image nor caption, by suffix
        self.refused = []  # folders that may not be read
        suffix = ".json" if caption_key else ".txt"
        for folder, names in walk(path, self.refused.append):
            captions = {name.stem: name for name in names if name.suffix.lower() == suffix}
            for name in names:
                kind = name.suffix.lower()
                if kind not in IMAGE_SUFFIXES:
                    self.others[kind or "no suffix"] += kind != suffix
                elif name.stem in captions:
                    self.pairs.append((folder / name, folder / captions[name.stem]))
                else:
                    self.without_caption.append(folder / name)
        self.pairs.sort()

    def describe(self):
        """What was found, in lines for the user."""
        place = f'in the field "{self.caption_key}" of a .json' if self.caption_key else "in a .txt"
        example = "cat.jpg with cat.json" if self.caption_key else "cat.jpg with cat.txt"
        yield f"{len(self.pairs)} images have a caption {place} beside them, as {example}."
        if self.without_caption:
            yield f"{len(self.without_caption)} images have no caption, as {self.without_caption[0]}."
        if kinds := ", ".join(f"{number} {kind}" for kind, number in self.others.most_common(6) if number):
            yield f"Not read: {kinds}."
        if self.refused:
            yield f"{len(self.refused)} folders may not be read, as {self.refused[0]}."
        if not self.caption_key and (fields := self.fields()):
            yield f"The .json files hold {fields}; name the caption among these by --caption-key."

    def fields(self):
        """The names of the fields of one .json that lies beside an image without a caption."""
        for image in self.without_caption[:100]:
            if (path := image.with_suffix(".json")).is_file():
                return ", ".join(sorted(facts_of(start_of(path, MAX_FACTS))))
        return ""


class Folder(Evaluated):
    """A folder, searched with all below it: the caption of `cat.jpg` is in `cat.txt`, or in a field of `cat.json`.

    Suffixes may be in any case. Of 200 pairs or more, one in 50 is held out, by a hash of its path in the folder.
    """

    def __init__(self, path, resolution, seed, caption_key=None):
        self.path, self.resolution, self.seed, self.caption_key = Path(path), resolution, seed, caption_key
        self.tally, self.patience = Tally(path), Patience(path)
        if not path or not os.path.exists(path):
            raise UserError(f"--data {path}: no such file or folder")
        if not self.path.is_dir():
            raise UserError(f"--data {path}: not a folder of images with .txt captions, nor a .tar shard")
        self.search = Search(path, caption_key)
        self.found = self.search.pairs
        if len(self.found) < 4:
            raise UserError(f"--data {path}: training needs at least 4 pairs. {' '.join(self.search.describe())}")
        self.holds_out = len(self.found) >= FEWEST
        split = {True: [], False: []}
        for pair in self.found:
            key = pair[0].relative_to(self.path).with_suffix("").as_posix()
            split[self.holds_out and is_held_out(key)].append(pair)
        self.held_out, self.pairs = split[True], split[False]

    def describe(self):
        """What was found, in lines for the user."""
        yield from self.search.describe()
        if self.holds_out:
            yield f"{len(self.held_out)} of the pairs are held out for evaluation."
        else:
            yield f"None is held out for evaluation, as there are fewer than {FEWEST}: it sees what training sees."

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a source lives as long as the run
    def order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))

    def example(self, pair):
        """(image [3, R, R], captions) of a pair, or None, and counted, where it cannot be used."""
        image, caption = pair
        try:
            files = start_of(image, MAX_FILE), start_of(caption, MAX_FACTS if self.caption_key else MAX_TEXT)
        except OSError as error:
            self.tally.skip(FILE, f"{image.name}: {error.strerror}")
            self.patience.fail(error)
            return None
        self.patience.succeed()
        try:
            if len(files[0]) == MAX_FILE:
                raise Unusable(LARGE)
            example = read_pair(files[0], files[1], files[1], self.resolution, self.caption_key)
        except Unusable as error:
            self.tally.skip(str(error), where(str(error), str(image.relative_to(self.path)), files[1]))
            return None
        self.tally.use()
        return example

    def none_usable(self):
        causes = self.tally.told(self.tally.skipped)
        return UserError(f"--data {self.path}: none of the {len(self.found)} pairs is usable: {causes}")

    def read(self, indices):
        """The pairs numbered so over all epochs; in place of one that cannot be used comes the next in the folder."""
        examples = []
        for index in indices:
            epoch, position = divmod(index, len(self.pairs))
            start = self.order(epoch)[position]
            while (usable := next(filter(None, self.from_position(start)), None)) is None:
                if not self.patience.failures:  # the disk gives all files, and none is of use
                    raise self.none_usable()
            examples.append(usable)
        return collate(examples, np.random.default_rng([self.seed, *indices]), self.tally)

    def from_position(self, start):
        """All pairs from one on, and around."""
        for number in range(start, start + len(self.pairs)):
            yield self.example(self.pairs[number % len(self.pairs)])

    def batches(self, steps, batch, rank, world_size):
        for step in steps:
            yield self.read(sample_indices(step, batch, rank, world_size))

    def examples(self, held_out=False, rank=0, world_size=1):
        """Every pair that can be used, once, with no replacements; with held_out only the held-out ones."""
        pairs = (self.held_out if held_out else [self.pairs[i] for i in self.order(0)])[rank::world_size]
        usable = filter(None, map(self.example, pairs))
        if (first := next(usable, None)) is None:
            if held_out or not pairs:
                return iter(())
            raise self.none_usable()
        return itertools.chain([first], usable)


def walk(path, refuse):
    """A folder, and all below it and behind its links → (folder, the names of its files); hidden ones are left out."""
    seen = set()
    for folder, folders, names in os.walk(path, followlinks=True, onerror=lambda error: refuse(error.filename)):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        yield Path(folder), [Path(name) for name in sorted(names) if not name.startswith(".")]


def start_of(path, most):
    """The first bytes of a file. Raises OSError, also for a pipe, whose other end might never write."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with open(path, "rb") as file:
        return file.read(most)
