"""Where captioned images come from: the built-in scenes, a folder, or WebDataset shards.

A source yields batches to the ranks: `batches` for training, endless and able to start at any step, as what a step sees
depends on the seed and the step alone; `evaluation` in a fixed order for the FID, of which a rank may take its share:
every world_size-th pair, so that it decodes no others. What cannot be used is skipped, and
every batch says how much was, and why.
"""

import collections
import functools
import glob
import io
import itertools
import json
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds
from braceexpand import braceexpand
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from common import distributed
from common.cli import UserError, first_line
from data.pairs import DUPLICATE, SHARD, Tally, Unusable, captions_of, read_captions, read_image
from data.scenes import make_scene, render, scene_or_twin

EMOJI = Path(__file__).parent / "emoji.tar.gz"
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
BLOCK = 250  # batches after which a stream of shards starts anew, from another seed
WORKER_TIMEOUT = 120  # seconds in which a worker must make a batch
RETRIES = 3  # of workers that hang or die, in a row


class Batch(NamedTuple):
    images: torch.Tensor  # [b, 3, R, R] in [−1, 1]
    captions: list[str]
    skipped: collections.Counter  # the pairs passed over on the way, by cause


def open_data(spec, resolution, seed):
    """The source named by --data: "emoji", "shapes", a folder of images with captions, or shards (a folder, a file, a
    pattern).

    Raises UserError where nothing usable is there.
    """
    if spec == "shapes":
        return Scenes(resolution, seed)
    if spec == "emoji":
        return Shards([str(EMOJI)], resolution, seed)
    shards = sorted(glob.glob(f"{glob.escape(spec)}/*.tar*")) if Path(spec).is_dir() else expand_shards(spec)
    return Shards(shards, resolution, seed) if shards else Folder(spec, resolution, seed)


def loader(source, first, batch, workers):
    """An endless iterator of this rank's share of each global batch from number `first` on, loaded by worker processes.

    Workers that hang or are killed are replaced, and their batches made again. Raises UserError where that fails.
    """
    share = batch // distributed.world_size(), distributed.rank(), distributed.world_size()
    failures = 0
    while True:
        stream, timeout = Stream(source, first, *share), WORKER_TIMEOUT if workers else 0
        options = {"num_workers": workers, "worker_init_fn": leave_signals_to_the_run, "timeout": timeout}
        try:
            batches = iter(DataLoader(stream, batch_size=None, **options))
            # DataLoader's handler raises at a worker's death, wherever the run happens to be; the timeout sees it too.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for made in batches:
                yield made
                first, failures = first + 1, 0
        except UserError as error:  # a worker's comes with its traceback
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("errors.UserError: ")) from error
        except (RuntimeError, EOFError, ConnectionError) as error:  # what becomes of DataLoader when a worker dies
            failures += 1
            if failures > RETRIES:
                raise UserError(f"the data workers failed {failures} times in a row: {first_line(error)}") from error
            tqdm.write(f"note: a data worker failed and is replaced ({first_line(error)})")


def leave_signals_to_the_run(_):
    """Ctrl-C and a warning of preemption reach the workers too; the run they serve decides when to stop."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Stream(IterableDataset):
    """A source's training batches for one rank. Worker k of n makes batches k, k + n, …, so their order stays fixed."""

    def __init__(self, source, first, *share):
        self.source = source
        self.first = first
        self.share = share  # batch of this rank, rank, number of ranks

    def __iter__(self):
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        return self.source.batches(range(self.first + offset, 2**62, stride), *self.share)


# ----------------------------------------------------------------------------------------------------------------------


class Scenes:
    """The built-in scenes. Scene number i of the run is the same on any number of ranks, so a run resumes exactly.

    They come with their twins: in a batch of thousands a caption meets others that nearly say the same; in a small one
    it would not, and telling captions apart by their colours would do.
    """

    def __init__(self, resolution, seed):
        self.resolution, self.seed = resolution, seed

    def draw(self, scenes):
        return Batch(render(scenes, self.resolution), [scene.caption for scene in scenes], collections.Counter())

    def batches(self, steps, batch, rank, world_size):
        for step in steps:
            indices = sample_indices(step, batch, rank, world_size)
            yield self.draw([scene_or_twin(i, 3 * self.seed) for i in indices])

    def examples(self, held_out=False):
        """Endless: more scenes than anyone trains on."""
        for images, captions, _ in self.evaluation(64, held_out):
            yield from zip(images, ([caption] for caption in captions), strict=True)

    def evaluation(self, batch=64, held_out=False, rank=0, world_size=1):
        if held_out:
            return
        for first in itertools.count(rank, batch * world_size):  # seed + 2 trains the small CLIP
            numbers = range(first, first + batch * world_size, world_size)
            yield self.draw([make_scene(i, 3 * self.seed + 1) for i in numbers])


def sample_indices(step, batch, rank, world_size):
    """The numbers, counted over the whole run and all ranks, of the samples that a rank sees in a step."""
    first = (step * world_size + rank) * batch
    return range(first, first + batch)


class Folder:
    """A folder, searched recursively, in which `name.txt` holds the caption of `name.jpg` (or png, webp, bmp)."""

    def __init__(self, path, resolution, seed):
        self.path, self.resolution, self.seed = path, resolution, seed
        self.tally = Tally(path)
        if not path or not Path(path).exists():
            raise UserError(f"--data {path}: no such file or folder")
        if not Path(path).is_dir():
            raise UserError(f"--data {path}: not a folder of images with .txt captions, nor a .tar shard")
        images = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        self.pairs = [image for image in images if image.with_suffix(".txt").is_file()]
        if len(self.pairs) < 4:
            raise UserError(
                f"--data {path}: {len(images)} images, of which {len(self.pairs)} have a caption; training needs at "
                "least 4 pairs, as cat.jpg with cat.txt beside it"
            )

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a source lives as long as the run
    def order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))

    def example(self, number):
        """(image [3, R, R], captions) of pair `number` in the folder, or None, and counted, where it cannot be used."""
        path = self.pairs[number]
        try:
            example = read_image(path, self.resolution), read_captions(path.with_suffix(".txt"))
        except Unusable as error:
            self.tally.skip(str(error))
            return None
        self.tally.use()
        return example

    def none_usable(self):
        causes = ", ".join(self.tally.skipped)
        return UserError(f"--data {self.path}: none of the {len(self.pairs)} pairs is usable: {causes}")

    def read(self, indices):
        """The pairs numbered so over all epochs; in place of one that cannot be used comes the next in the folder."""
        examples = []
        for index in indices:
            epoch, position = divmod(index, len(self.pairs))
            start = self.order(epoch)[position]
            candidates = (self.example(n % len(self.pairs)) for n in range(start, start + len(self.pairs)))
            if (usable := next(filter(None, candidates), None)) is None:
                raise self.none_usable()
            examples.append(usable)
        return collate(examples, np.random.default_rng([self.seed, *indices]), self.tally)

    def batches(self, steps, batch, rank, world_size):
        for step in steps:
            yield self.read(sample_indices(step, batch, rank, world_size))

    def examples(self, held_out=False, rank=0, world_size=1):
        """Every pair that can be used, once: a stand-in would be the same image twice. None is held out."""
        numbers = () if held_out else self.order(0)[rank::world_size]
        usable = filter(None, map(self.example, numbers))
        if (first := next(usable, None)) is None and len(numbers):
            raise self.none_usable()
        return itertools.chain(filter(None, [first]), usable)

    def evaluation(self, batch=64, held_out=False, rank=0, world_size=1):
        examples = with_one_caption(self.examples(held_out, rank, world_size), self.seed, rank, world_size)
        return collated(examples, batch, np.random.default_rng(self.seed), self.tally)


class Shards:
    """WebDataset shards as img2dataset writes them: `key.jpg`, `key.txt`, `key.json` in 00000.tar, 00001.tar, …

    Endless: each rank and worker draws shards with replacement, and shuffles what they hold. After BLOCK batches it
    does so anew, under a seed made of the run's, the block's and its own, so that a resumed run need not read what came
    before the block it is in. It sees what the uninterrupted one would have seen, if ranks and workers are as many.
    """

    def __init__(self, urls, resolution, seed):
        self.urls, self.resolution, self.seed = urls, resolution, seed
        self.tally = Tally(urls[0] if len(urls) == 1 else f"{urls[0]} … {urls[-1]}")
        missing = [url for url in urls if "://" not in url and not url.startswith("pipe:") and not Path(url).is_file()]
        if missing:
            raise UserError(f"--data: no such shard: {missing[0]}")
        if next(self.evaluation(1), None) is None:
            causes = ", ".join(f"{count} {cause}" for cause, count in self.tally.take().items()) or "they hold none"
            raise UserError(
                f"--data: not one usable pair of an image and a .txt caption in {len(urls)} shard(s) from {urls[0]}: "
                f"{causes}"
            )

    def samples(self, shards, *more):
        """Shards → raw samples, {suffix: bytes}."""

        def skip(error):
            self.tally.skip(DUPLICATE if "duplicate file name" in str(error) else SHARD)
            return True

        return iter(wds.DataPipeline(shards, wds.tarfile_to_samples(handler=skip), *more))

    def usable(self, samples, wanted):
        """Raw samples → (image [3, R, R], captions), without those that cannot be used, or of which not wanted(facts).

        facts: what a sample's .json holds, as a dict.
        """
        for sample in samples:
            if not wanted(facts_of(sample.get("json", b"{}"))):
                continue
            data = next((sample[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in sample), b"")
            try:
                example = read_image(io.BytesIO(data), self.resolution), captions_of(sample.get("txt", b""))
            except Unusable as error:
                self.tally.skip(str(error))
                continue
            self.tally.use()
            yield example

    def block(self, batch, *seed):
        """The batches of one block, an endless iterator."""
        rng = np.random.default_rng([self.seed, *seed])
        drawn = ({"url": self.urls[i]} for i in iter(lambda: rng.integers(len(self.urls)), None))
        samples = self.samples(lambda: drawn, wds.shuffle(1000, seed=int(rng.integers(2**31))))

        def drawn_now(facts):
            return not facts.get("held_out") and rng.random() < facts.get("weight", 1)

        return collated(self.usable(samples, drawn_now), batch, rng, self.tally)

    def batches(self, steps, batch, rank, world_size):
        stream = steps.start % steps.step  # the worker's number, also after it began at another step
        for number in itertools.count(steps.start // BLOCK):
            mine = [i for i in range(number * BLOCK, (number + 1) * BLOCK) if i % steps.step == stream]
            made = self.block(batch, number, rank, world_size, stream, steps.step)
            yield from itertools.islice(made, sum(i < steps.start for i in mine), len(mine))

    def examples(self, held_out=False, rank=0, world_size=1):
        """Every pair that can be used, once; or those alone whose .json says `held_out`."""
        numbers = itertools.count()

        def wanted(facts):
            return bool(facts.get("held_out")) == held_out and next(numbers) % world_size == rank

        return self.usable(self.samples(wds.SimpleShardList(self.urls)), wanted)

    def evaluation(self, batch=64, held_out=False, rank=0, world_size=1):
        examples = with_one_caption(self.examples(held_out, rank, world_size), self.seed, rank, world_size)
        return collated(examples, batch, np.random.default_rng(self.seed), self.tally)


def with_one_caption(examples, seed, rank, world_size):
    """A rank's share of (image, captions) → with one caption each, the same on any number of ranks."""
    for number, (image, captions) in enumerate(examples):
        rng = np.random.default_rng([seed, rank + number * world_size])
        yield image, [captions[rng.integers(len(captions))]]


def collate(examples, rng, tally):
    """Some (image, captions) → a Batch, for each image one of its captions."""
    images, captions = zip(*examples, strict=True)
    return Batch(torch.stack(images), [lines[rng.integers(len(lines))] for lines in captions], tally.take())


def collated(examples, batch, rng, tally):
    """An iterator of examples → one of Batches; the last may be smaller."""
    while some := list(itertools.islice(examples, batch)):
        yield collate(some, rng, tally)


def facts_of(data):
    """What the .json of a sample says, as a dict; one that cannot be read says nothing."""
    try:
        facts = json.loads(data)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def expand_shards(spec):
    """A .tar or .tar.gz file, or a pattern of them, as data/{00000..00041}.tar, → the shards; anything else → none."""
    try:
        return list(braceexpand(spec)) if spec.endswith(SHARD_SUFFIXES) else []
    except ValueError as error:
        raise UserError(f"--data {spec}: the braces do not match; write shards as data/{{00000..00041}}.tar") from error
