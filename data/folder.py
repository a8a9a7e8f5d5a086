"""A folder of images, with a caption next to each."""

import collections
import functools
import itertools
import os
import unicodedata
from pathlib import Path

import numpy as np

from common.cli import UserError
from data.pairs import FILE, IMAGE_SUFFIXES, MAX_FILE, Sample
from data.sources import FEWEST, JSON_UNREAD, SHARD_SUFFIXES, Source, sample_indices

ALONE = "images have no caption"
SHARDS = "shards are not read (name them in --data)"
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")


class Folder(Source):
    """A folder and all below it: the caption of `cat.jpg` is in `cat.txt`, or in a field of `cat.json`.

    Suffixes may be in any case. Of 200 pairs or more, one in 50 is held out, by a hash of its picture. An epoch
    contains each pair once, in an order of its own; an unusable pair is replaced by another one.
    """

    def __init__(self, path, resolution, seed, caption_key=None):
        super().__init__(path, resolution, seed, caption_key)
        if not os.path.isdir(path):
            raise UserError(f"--data {path}: no such folder of images with .txt captions, nor a .tar shard")
        self.pairs, self.problems, self.others = search(path, ".json" if caption_key else ".txt")
        if not self.pairs and SHARDS in self.problems:
            raise UserError(f"--data {path} contains shards: name them, such as {path}/{{00000..00041}}.tar")
        if len(self.pairs) < 4:
            raise UserError(f"--data {path}: at least 4 pairs are needed. {' '.join(self.findings())}")
        self.holds_out = len(self.pairs) >= FEWEST
        self.check(any(self.read(number, held_out=False) for number in self.order(0)))

    def findings(self):
        suffix = ".json" if self.caption_key else ".txt"
        place = f'the field "{self.caption_key}" of a .json' if self.caption_key else "a .txt"
        yield f"{len(self.pairs)} images have a caption in {place} next to them, such as cat.jpg with cat{suffix}."
        for problem, paths in self.problems.items():
            yield f"{len(paths)} {problem}, such as {paths[0]}."
        if self.others:
            yield f"Not read: {', '.join(f'{count} {kind}' for kind, count in self.others.most_common(8))}."
        if ALONE in self.problems and self.others[".json"]:
            yield JSON_UNREAD

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a source lives as long as the run
    def order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))

    def read(self, number, held_out):
        """(image [3, R, R], captions) of a pair; None if it belongs to the other part, or is unusable and counted."""
        image, caption = self.pairs[number]
        try:
            parts = {os.path.splitext(path)[1].lower(): read_file(path) for path in (image, caption)}
        except OSError as error:
            self.skips.fail(FILE, f"{image}: {error.strerror}")
            return None
        self.skips.failing_since = None
        sample = Sample(image, parts)
        return self.example(sample) if self.is_for(sample, held_out) else None

    def replacement(self, index):
        """The first usable pair from a random one on, in the order of the folder."""
        start = np.random.default_rng([self.seed, index]).integers(len(self.pairs))
        pairs = (self.read(number % len(self.pairs), held_out=False) for number in itertools.count(start))
        return next(filter(None, pairs))

    def batches(self, steps, batch, rank, world_size):
        for step in steps:
            examples, indices = [], sample_indices(step, batch, rank, world_size)
            for index in indices:
                epoch, position = divmod(index, len(self.pairs))
                number = self.order(epoch)[position]
                image, captions = self.read(number, held_out=False) or self.replacement(index)
                line = np.random.default_rng([self.seed, index]).integers(len(captions))
                examples.append((image, captions[line : line + 1]))
            yield self.collate(examples)

    def examples(self, held_out=False, rank=0, world_size=1):
        return filter(None, (self.read(number, held_out) for number in self.order(0)[rank::world_size]))


def search(path, suffix):
    """The files in a folder and all below it → [(image, the file of its caption)], {problem: its paths}, and a Counter
    of the suffixes of other files. suffix: of captions.
    """
    pairs, problems, others = [], collections.defaultdict(list), collections.Counter()
    for files in walk(path, problems):
        captions = {stem_of(file): file for file in files if file.suffix.lower() == suffix}
        images = {stem_of(file) for file in files if file.suffix.lower() in IMAGE_SUFFIXES}
        for file in files:
            kind, stem = file.suffix.lower(), stem_of(file)
            if file.name.lower().endswith(SHARD_SUFFIXES):
                problems[SHARDS].append(file)
            elif kind in IMAGE_SUFFIXES and stem in captions:
                pairs.append((file, captions[stem]))
            elif kind in IMAGE_SUFFIXES:
                problems[ALONE].append(file)
            elif kind != suffix:
                others[kind or "no suffix"] += 1
            elif stem not in images:
                problems["captions have no image"].append(file)
    # As texts, because a Path takes four times the memory, and each worker has its own copy.
    return [(str(image), str(caption)) for image, caption in sorted(pairs)], problems, others


def walk(path, problems):
    """Yields the files of a folder, then of each one below it. Hidden ones are left out, and links not followed."""
    folders = [path]
    for folder in folders:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            problems["folders may not be read"].append(folder)
            continue
        files = []
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_file(follow_symlinks=False):
                files.append(Path(entry.path))
            else:
                problems["links, or special files, are not read"].append(entry.path)
        yield files


def is_hidden(name):
    """Whether people do not see the file or folder of this name."""
    return (name.startswith(".") and name not in (".", "..")) or name in SYSTEM_FOLDERS


def stem_of(path):
    """A file's name without its suffix, in one Unicode form: a Mac writes "ü" as two characters."""
    return unicodedata.normalize("NFC", path.stem)


def read_file(path):
    """The bytes of a file, up to MAX_FILE. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(MAX_FILE)
