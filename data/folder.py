"""A folder of images, with a caption next to each."""

import collections
import errno
import functools
import itertools
import os
import stat
import unicodedata
from pathlib import Path

import numpy as np

from common.cli import UserError
from data.pairs import FILE, IMAGE_SUFFIXES, LIMITS, Sample, facts_of
from data.sources import FEWEST, SHARD_SUFFIXES, TXT_UNREAD, Source, leads_out, sample_indices, some

ALONE = "images have no caption"
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")
HIDDEN = "images have names that begin with a period, and are not read"
BELOW = "shard(s) in subfolders are not read: name a pattern or their folder"


class Folder(Source):
    """A folder and all below it: the caption of `cat.jpg` is in `cat.txt`, or in a field of `cat.json`.

    Suffixes may be in any case. Of 200 pairs or more, one in 50 is held out, by a hash of its picture. An epoch
    contains each pair once, in an order of its own; an unusable pair is replaced by another one.
    """

    def __init__(self, path, resolution, seed, caption_key=None):
        super().__init__(path, resolution, seed, caption_key)
        if not path or not os.path.exists(path):
            raise UserError(f"--data {path}: no such file or folder")
        if not os.path.isdir(path):
            raise UserError(f"--data {path}: not a folder of images with .txt captions, nor a .tar shard")
        self.pairs, self.problems, self.others = search(path, caption_key)
        if len(self.pairs) < 4:
            raise UserError(f"--data {path}: at least 4 pairs are needed. {' '.join(self.findings())}")
        self.holds_out = len(self.pairs) >= FEWEST
        self.check(any(self.read(number, held_out=False) for number in self.order(0)))

    def files(self):
        return itertools.chain.from_iterable(self.pairs)

    def findings(self):
        suffix = ".json" if self.caption_key else ".txt"
        place = f'the field "{self.caption_key}" of a .json' if self.caption_key else "a .txt"
        yield f"{len(self.pairs)} images have a caption in {place} next to them, such as cat.jpg with cat{suffix}."
        yield from describe(self.problems, self.others)
        if self.caption_key and self.others[".txt"]:
            yield TXT_UNREAD
        if not self.caption_key and (fields := self.fields()):
            yield f"The .json files have the fields {fields}; name the one with the caption with --caption-key."

    def fields(self):
        """The names of the fields of one .json next to an image without a caption."""
        for image in self.problems.get(ALONE, [])[:100]:
            path = image.with_suffix(".json")
            if path.is_file() and (facts := facts_of(read_start(path))):
                return ", ".join(sorted(facts))
        return ""

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a source lives as long as the run
    def order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))

    def read(self, number, held_out):
        """(image [3, R, R], captions) of a pair; None if it belongs to the other part, or is unusable and counted."""
        image, caption = self.pairs[number]
        try:
            parts = {path.suffix.lower(): read_start(path) for path in (image, caption)}
        except OSError as error:
            self.skips.fail(FILE, f"{image}: {error.strerror}")
            return None
        self.skips.failures = 0
        sample = Sample(str(image), parts)
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
                examples.append(self.read(number, held_out=False) or self.replacement(index))
            yield self.collate(examples, np.random.default_rng([self.seed, *indices]))

    def examples(self, held_out=False, rank=0, world_size=1):
        return filter(None, (self.read(number, held_out) for number in self.order(0)[rank::world_size]))


def search(path, caption_key=None):
    """The files in a folder and all below it → [(image, the file of its caption)], {problem: its paths}, and a Counter
    of the suffixes of other files.
    """
    suffix = ".json" if caption_key else ".txt"
    pairs, problems, others = [], collections.defaultdict(list), collections.Counter()
    for folder, names in walk(path, problems):
        captions = {stem_of(name): name for name in names if name.suffix.lower() == suffix}
        images = {stem_of(name) for name in names if name.suffix.lower() in IMAGE_SUFFIXES}
        for name in names:
            kind = name.suffix.lower()
            if kind == suffix:
                if stem_of(name) not in images:
                    problems["captions have no image"].append(folder / name)
                elif captions[stem_of(name)] != name:  # cat.TXT next to cat.txt
                    problems["captions belong to an image that has another"].append(folder / name)
            elif name.name.lower().endswith(SHARD_SUFFIXES):
                if folder != Path(path):
                    problems[BELOW].append(folder)
            elif kind not in IMAGE_SUFFIXES:
                others[kind or "no suffix"] += 1
            elif stem_of(name) in captions:
                pairs.append((folder / name, folder / captions[stem_of(name)]))
            else:
                problems[ALONE].append(folder / name)
    return sorted(pairs), problems, others


def describe(problems, others):
    """What `search` found beside pairs, in lines for the user."""
    for problem, paths in problems.items():
        yield f"{len(paths)} {problem}, such as {paths[0]}."
    if others:
        yield f"Not read: {some(f'{number} {kind}' for kind, number in others.most_common())}."


def is_hidden(name):
    """Whether people do not see the file or folder of this name."""
    return (name.startswith(".") and name not in (".", "..")) or name in SYSTEM_FOLDERS


def stem_of(name):
    """A Path's name without its suffix, in one Unicode form: a Mac writes "ü" as two characters."""
    return unicodedata.normalize("NFC", name.stem)


def walk(path, problems):
    """Yields a folder and each one below it, with the names of its files. Hidden files are left out, and links that
    lead out of the folder are not followed.
    """

    def refuse(error):
        problems["folders may not be read"].append(error.filename)

    seen = set()
    for folder, folders, names in os.walk(path, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in seen:  # a circle of links
            folders.clear()
            continue
        seen.add(real)
        for kind in (folders, names):
            found = sorted(kind)
            kind.clear()
            for name in found:
                if is_hidden(name):
                    if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("._"):  # a Mac's, and no image
                        problems[HIDDEN].append(Path(folder, name))
                elif leads_out(os.path.join(folder, name), path):
                    problems["links lead out of the folder and are not followed"].append(Path(folder, name))
                else:
                    kind.append(name)
        yield Path(folder), [Path(name) for name in names]


def read_start(path):
    """The bytes of a file up to its limit. Raises OSError, also for a pipe, whose other end might never write."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with open(path, "rb") as file:
        return file.read(LIMITS[path.suffix.lower()])
