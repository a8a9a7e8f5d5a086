"""A folder of images, with a caption beside each."""

import collections
import errno
import functools
import os
import stat
from pathlib import Path

import numpy as np

from common.cli import UserError
from data.pairs import FILE, IMAGE_SUFFIXES, MAX_FACTS, MAX_FILE, MAX_TEXT, Unusable, facts_of, read_pair, where
from data.sources import FEWEST, Source, collate, is_held_out, leads_out, sample_indices


class Search:
    """The images in a folder and all below it, and the captions beside them."""

    def __init__(self, path, caption_key=None):
        self.caption_key = caption_key
        self.pairs = []  # (image, the file of its caption)
        self.lacks = collections.defaultdict(list)  # what is wrong: the paths of which it is
        self.others = collections.Counter()  # files that are neither image nor caption, by suffix
        suffix = ".json" if caption_key else ".txt"
        for folder, names in self.walk(path):
            captions = {name.stem: name for name in names if name.suffix.lower() == suffix}
            images = {name.stem for name in names if name.suffix.lower() in IMAGE_SUFFIXES}
            for name in names:
                kind = name.suffix.lower()
                if kind == suffix:
                    if name.stem not in images:
                        self.lacks["captions have no image"].append(folder / name)
                elif kind not in IMAGE_SUFFIXES:
                    self.others[kind or "no suffix"] += 1
                elif name.stem in captions:
                    self.pairs.append((folder / name, folder / captions[name.stem]))
                else:
                    self.lacks["images have no caption"].append(folder / name)
        self.pairs.sort()

    def walk(self, path):
        """A folder, and all below it → (folder, the names of its files); hidden ones are left out."""

        def refuse(error):
            self.lacks["folders may not be read"].append(error.filename)

        seen = set()
        for folder, folders, names in os.walk(path, followlinks=True, onerror=refuse):
            real = os.path.realpath(folder)
            if real in seen:  # a link that leads back
                folders.clear()
                continue
            seen.add(real)
            for kind in (folders, names):
                kind[:] = sorted(name for name in kind if not name.startswith((".", "__MACOSX")))
                astray = [name for name in kind if leads_out(os.path.join(folder, name), path)]
                self.lacks["links lead out of the folder and are not followed"] += [Path(folder, n) for n in astray]
                kind[:] = [name for name in kind if name not in astray]
            yield Path(folder), [Path(name) for name in names]

    def describe(self):
        """What was found, in lines for the user."""
        place, suffix = f'in the field "{self.caption_key}" of a .json', ".json"
        if not self.caption_key:
            place, suffix = "in a .txt", ".txt"
        yield f"{len(self.pairs)} images have a caption {place} beside them, as cat.jpg with cat{suffix}."
        for what, paths in self.lacks.items():
            if paths:
                yield f"{len(paths)} {what}, as {paths[0]}."
        if self.others:
            yield f"Not read: {', '.join(f'{number} {kind}' for kind, number in self.others.most_common(6))}."
        if not self.caption_key and (fields := self.fields()):
            yield f"The .json files hold {fields}; name the caption among these by --caption-key."

    def fields(self):
        """The names of the fields of one .json that lies beside an image without a caption."""
        for image in self.lacks["images have no caption"][:100]:
            if (path := image.with_suffix(".json")).is_file():
                return ", ".join(sorted(facts_of(start_of(path, MAX_FACTS))))
        return ""


class Folder(Source):
    """A folder, searched with all below it: the caption of `cat.jpg` is in `cat.txt`, or in a field of `cat.json`.

    Suffixes may be in any case. Of 200 pairs or more, one in 50 is held out, by a hash of its picture. In a pass over
    the folder each pair comes once, in an order of its own; in place of one that cannot be used comes another.
    """

    def __init__(self, path, resolution, seed, caption_key=None):
        super().__init__(path, resolution, seed, caption_key)
        if not path or not os.path.exists(path):
            raise UserError(f"--data {path}: no such file or folder")
        if not os.path.isdir(path):
            raise UserError(f"--data {path}: not a folder of images with .txt captions, nor a .tar shard")
        self.search = Search(path, caption_key)
        self.pairs = self.search.pairs
        if len(self.pairs) < 4:
            raise UserError(f"--data {path}: training needs at least 4 pairs. {' '.join(self.search.describe())}")
        self.holds_out = len(self.pairs) >= FEWEST

    def describe(self):
        yield from self.search.describe()
        yield self.said_of_held_out()

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a source lives as long as the run
    def order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))

    def example(self, number, held_out):
        """(image [3, R, R], captions) of a pair; None if it is of the other part, or cannot be used and is counted."""
        image, caption = self.pairs[number]
        try:
            files = start_of(image, MAX_FILE), start_of(caption, MAX_FACTS if self.caption_key else MAX_TEXT)
        except OSError as error:
            self.tally.skip(FILE, f"{image}: {error.strerror}")
            self.patience.fail(error)
            return None
        self.patience.succeed()
        facts = facts_of(files[1]) if self.caption_key else {}
        if (self.holds_out and is_held_out(files[0], facts)) != held_out:
            return None
        try:
            example = read_pair(files[0], files[1], files[1], self.resolution, self.caption_key)
        except Unusable as error:
            self.tally.skip(str(error), where(str(error), str(image), files[1]))
            return None
        self.tally.use()
        return example

    def instead(self, index):
        """The first pair of use in the order of the folder, from a random one on, and around."""
        start, count = np.random.default_rng([self.seed, index]).integers(len(self.pairs)), len(self.pairs)
        while True:
            for number in range(start, start + count):
                if example := self.example(number % count, held_out=False):
                    return example
            if not self.patience.failures:  # the disk gives all files, and none is of use
                raise self.none_usable()

    def none_usable(self):
        causes = self.tally.told() or "all are held out"
        return UserError(f"--data {self.name}: none of the {len(self.pairs)} pairs is usable: {causes}")

    def batches(self, steps, batch, rank, world_size):
        for step in steps:
            examples, indices = [], sample_indices(step, batch, rank, world_size)
            for index in indices:
                epoch, position = divmod(index, len(self.pairs))
                examples.append(self.example(self.order(epoch)[position], held_out=False) or self.instead(index))
            yield collate(examples, np.random.default_rng([self.seed, *indices]), self.tally)

    def examples(self, held_out=False, rank=0, world_size=1):
        usable = False
        for number in self.order(0)[rank::world_size]:
            if example := self.example(number, held_out):
                usable = True
                yield example
        if not usable and not held_out and len(self.pairs) > rank:
            raise self.none_usable()


def start_of(path, most):
    """The first bytes of a file. Raises OSError, also for a pipe, whose other end might never write."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with open(path, "rb") as file:
        return file.read(most)
