"""Where captioned images come from: the built-in scenes, a folder, or WebDataset shards.

A source yields batches to the ranks: `batches` for training, endless and able to start at any step; `evaluation` in a
fixed order for the FID. What cannot be read is skipped, and every batch says how much was.
"""

import functools
import glob
import io
import itertools
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds
from braceexpand import braceexpand
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import distributed
import shapes
from errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Batch(NamedTuple):
    images: torch.Tensor  # [b, 3, R, R] in [−1, 1]
    captions: list[str]
    skipped: int  # broken pairs passed over on the way


def open_data(spec, resolution, seed):
    """The source named by --data: "shapes", a folder of images with captions, or shards (a folder, a file, a pattern).

    Raises UserError where nothing usable is there.
    """
    if spec == "shapes":
        return Scenes(resolution, seed)
    shards = sorted(glob.glob(f"{glob.escape(spec)}/*.tar")) if Path(spec).is_dir() else expand_shards(spec)
    return Shards(shards, resolution, seed) if shards else Folder(spec, resolution, seed)


def loader(source, first_step, batch, workers):
    """An endless iterator of this rank's share of each global batch from first_step on, loaded by worker processes."""
    stream = Stream(source, first_step, batch // distributed.world_size(), distributed.rank(), distributed.world_size())
    try:
        yield from DataLoader(stream, batch_size=None, num_workers=workers, worker_init_fn=ignore_interrupts)
    except UserError as error:  # a worker's comes with its traceback
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("errors.UserError: ")) from error


def ignore_interrupts(_):
    """Ctrl-C reaches the workers too; the run they serve decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Stream(IterableDataset):
    """A source's training batches for one rank. Worker k of n makes steps k, k + n, …, so their order stays fixed."""

    def __init__(self, source, first_step, *share):
        self.source = source
        self.first_step = first_step
        self.share = share  # batch of this rank, rank, number of ranks

    def __iter__(self):
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        return self.source.batches(range(self.first_step + offset, 2**62, stride), *self.share)


# ----------------------------------------------------------------------------------------------------------------------


class Scenes:
    """The built-in scenes. Scene number i of the run is the same on any number of ranks, so a run resumes exactly.

    They come with their twins: in a batch of thousands a caption meets others that nearly say the same; in a small one
    it would not, and telling captions apart by their colours would do.
    """

    def __init__(self, resolution, seed):
        self.resolution, self.seed = resolution, seed

    def draw(self, scenes):
        return Batch(shapes.draw(scenes, self.resolution), [scene.caption for scene in scenes], 0)

    def batches(self, steps, batch, rank, world_size):
        for step in steps:
            indices = sample_indices(step, batch, rank, world_size)
            yield self.draw([shapes.scene_or_twin(i, 3 * self.seed) for i in indices])

    def evaluation(self, batch=64):
        for first in itertools.count(0, batch):  # seed + 2 trains the small CLIP
            yield self.draw([shapes.scene(i, 3 * self.seed + 1) for i in range(first, first + batch)])


def sample_indices(step, batch, rank, world_size):
    """The numbers, counted over the whole run and all ranks, of the samples that a rank sees in a step."""
    first = (step * world_size + rank) * batch
    return range(first, first + batch)


class Folder:
    """A folder, searched recursively, in which `name.txt` holds the caption of `name.jpg` (or png, webp, bmp)."""

    def __init__(self, path, resolution, seed):
        self.path, self.resolution, self.seed = path, resolution, seed
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

    def read(self, indices):
        """The pairs numbered so over all epochs; in place of one that cannot be read comes the next in the folder."""
        images, captions, skipped = [], [], 0
        for index in indices:
            epoch, position = divmod(index, len(self.pairs))
            start = self.order(epoch)[position]
            for candidate in range(start, start + len(self.pairs)):
                path = self.pairs[candidate % len(self.pairs)]
                try:
                    text = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
                    image, caption = read_pair(path, text, self.resolution)
                except Exception:  # Pillow stumbles over broken files in every way there is
                    skipped += 1
                    continue
                images.append(image)
                captions.append(caption)
                break
            else:
                raise UserError(
                    f"--data {self.path}: none of the {len(self.pairs)} pairs can be read; images must be whole, and "
                    "captions UTF-8 and not empty"
                )
        return Batch(torch.stack(images), captions, skipped)

    def batches(self, steps, batch, rank, world_size):
        for step in steps:
            yield self.read(sample_indices(step, batch, rank, world_size))

    def evaluation(self, batch=64):
        for first in range(0, len(self.pairs), batch):
            yield self.read(range(first, min(first + batch, len(self.pairs))))


class Shards:
    """WebDataset shards as img2dataset writes them: `key.jpg`, `key.txt`, `key.json` in 00000.tar, 00001.tar, …

    Shards are drawn with replacement under a seed made of the run's, the rank and the step at which the stream starts:
    endless, the same for the same start, though a resumed run does not see what the uninterrupted one would have seen.
    """

    def __init__(self, urls, resolution, seed):
        self.urls, self.resolution, self.seed = urls, resolution, seed
        self.skipped = 0
        missing = [url for url in urls if "://" not in url and not url.startswith("pipe:") and not Path(url).is_file()]
        if missing:
            raise UserError(f"--data: no such shard: {missing[0]}")
        if next(iter(self.pipeline(wds.SimpleShardList(urls))), None) is None:
            raise UserError(
                f"--data: not one readable pair of an image and a .txt caption in {len(urls)} shard(s) from {urls[0]}; "
                f"{self.skipped} were skipped as broken"
            )

    def skip(self, error):
        """A handler for webdataset: counts what went wrong, and goes on."""
        self.skipped += 1
        return True

    def pipeline(self, *shard_stages):
        """Shards → (image [3, R, R], caption)."""
        return wds.DataPipeline(
            *shard_stages, wds.tarfile_to_samples(handler=self.skip), wds.map(self.decode, handler=self.skip)
        )

    def decode(self, sample):
        """A raw sample → image and caption; raises on whatever is wrong with it."""
        data = next((sample[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in sample), b"")
        caption = sample["txt"].decode("utf-8").strip()
        return read_pair(io.BytesIO(data), caption, self.resolution)

    def stream(self, batch, *seed):
        number = int(np.random.default_rng([self.seed, *seed]).integers(2**31))
        shards = wds.ResampledShards(self.urls, seed=number, deterministic=True)
        return self.collate(wds.DataPipeline(self.pipeline(shards), wds.shuffle(1000, seed=number)), batch)

    def collate(self, pairs, batch):
        pairs, before = iter(pairs), self.skipped
        while some := list(itertools.islice(pairs, batch)):
            images, captions = zip(*some, strict=True)
            yield Batch(torch.stack(images), list(captions), self.skipped - before)
            before = self.skipped

    def batches(self, steps, batch, rank, world_size):
        return self.stream(batch, steps.start, rank, world_size)

    def evaluation(self, batch=64):
        return self.collate(self.pipeline(wds.SimpleShardList(self.urls)), batch)


def expand_shards(spec):
    """A .tar file or a pattern of them, as data/{00000..00041}.tar, → the list of shards; anything else → none."""
    try:
        return list(braceexpand(spec)) if spec.endswith(".tar") else []
    except ValueError as error:
        raise UserError(f"--data {spec}: the braces do not match; write shards as data/{{00000..00041}}.tar") from error


def read_pair(file, caption, resolution):
    """An image file and a caption → the centre square [3, R, R] in [−1, 1], and the caption; raises if broken."""
    if not caption:
        raise ValueError("empty caption")
    with Image.open(file) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1, caption
