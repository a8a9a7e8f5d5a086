"""Pictures without a file: coloured figures on a plain background, and the preset `tiny`, which learns from them in
seconds.

`python -m tests.figures OPTIONS` is train.py with that preset.
"""

import atexit
import collections
import dataclasses
import functools
import io
import itertools
import json
import random
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from aurora import Generator
from clip import load_clip
from data.emoji import SHARD
from data.sources import Batch, Source, sample_indices
from evaluation.extractors import Extractor
from presets import (
    PRESETS,
    SMALL_DISCRIMINATOR,
    SMALL_GENERATOR,
    SMALL_RECIPE,
    DiscriminatorConfig,
    DiscriminatorLevel,
    GeneratorConfig,
    Level,
    Preset,
    Recipe,
    UpsamplerConfig,
)
from weights.generator_file import content, save_generator

SIZES = {"small": 0.2, "large": 0.4}  # radius, as a share of the picture's side
COLORS = {"red": (230, 30, 30), "yellow": (240, 220, 20), "green": (30, 160, 50), "blue": (30, 60, 220)}
SHAPES = {"circle": 0, "square": 4, "triangle": 3}  # corners
BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "brown": (120, 70, 30)}

GENERATOR = SMALL_GENERATOR | {"w_dim": 64, "mapping_dim": 64, "num_heads": 2, "head_dim": 16}
DISCRIMINATOR = SMALL_DISCRIMINATOR | {"num_heads": 2, "head_dim": 16}
# fmt: off
TINY = Preset(
    GeneratorConfig(levels=(
        Level(4, 64, num_blocks=1, deformable=True),
        Level(8, 64, num_blocks=1, attn_depth=1, num_experts=4),
        Level(16, 32, num_blocks=1),
        Level(32, 16, num_blocks=1, num_kernels=2),
    ), fourier_channels=32, **GENERATOR),
    DiscriminatorConfig(levels=(
        DiscriminatorLevel(4, 64, num_blocks=0),
        DiscriminatorLevel(8, 64, num_blocks=0, attn_depth=1),
        DiscriminatorLevel(16, 32, num_blocks=0),
        DiscriminatorLevel(32, 16, num_blocks=0),
    ), **DISCRIMINATOR),
    Recipe(
        steps=1000, batch=8, images_per_phase={4: 0, 8: 0, 16: 256_000}, ema_half_life=5_000, fid_samples=16,
        fid_every=4_000, r1_gamma=16.0, **SMALL_RECIPE,
    ), clip_model="emoji",
)
# The second stage, from 8×8 to 16×16 and 32×32, on crops of half the side.
LARGER = Preset(
    UpsamplerConfig(levels=(
        Level(4, 32, num_blocks=1, attn_depth=1, num_experts=2),
        *(Level(r, 32, num_blocks=1) for r in (8, 16, 32)),
    ), input_resolution=8, **GENERATOR),
    DiscriminatorConfig(levels=(
        DiscriminatorLevel(8, 32, num_blocks=0, takes_images=False),
        DiscriminatorLevel(16, 32, num_blocks=0),
        DiscriminatorLevel(32, 16, num_blocks=0),
    ), **DISCRIMINATOR | {"clip_maps": ()}),
    dataclasses.replace(
        TINY.recipe, images_per_phase={16: 0}, crop=4, l1_weight=10.0, perceptual_weight=5.0, momentum_generator=0.9,
    ), clip_model="emoji",
)
# fmt: on
# The two lowest resolutions of TINY, which grow after two steps of four images.
QUICK = dataclasses.replace(
    TINY,
    generator=dataclasses.replace(TINY.generator, levels=TINY.generator.levels[:2]),
    discriminator=dataclasses.replace(TINY.discriminator, levels=TINY.discriminator.levels[:2]),
    recipe=dataclasses.replace(
        TINY.recipe, steps=5, batch=4, images_per_phase={4: 8}, fid_samples=8, fid_every=8, fid_factor=0.0
    ),
)
PRESETS |= {"tiny": TINY, "tiny-larger": LARGER, "quick": QUICK}
# In the place of EfficientNet's 1,280 features, whose covariances take seconds.
GRID_MEANS = Extractor("means of a 4×4 grid", lambda pixels: F.adaptive_avg_pool2d(pixels / 255, 4).flatten(1), None)


def words(number, seed=0):
    """The size, color, shape and background of a figure."""
    rng = random.Random(f"{seed}/{number}")
    return tuple(rng.choice(list(names)) for names in (SIZES, COLORS, SHAPES, BACKGROUNDS))


def caption(number, seed=0):
    size, color, shape, background = words(number, seed)
    return f"{size} {color} {shape} on {background}"


def picture(number, resolution, seed=0):
    """A PIL image. It is drawn four times as large and averaged down."""
    size, color, shape, background = words(number, seed)
    rng, side = random.Random(f"place {seed}/{number}"), 4 * resolution
    radius = SIZES[size] * side
    center = [rng.uniform(radius, side - radius) for _ in range(2)]
    image = Image.new("RGB", (side, side), BACKGROUNDS[background])
    canvas = ImageDraw.Draw(image)
    if corners := SHAPES[shape]:
        canvas.regular_polygon((*center, radius), corners, fill=COLORS[color])
    else:
        canvas.circle(center, radius, fill=COLORS[color])
    return image.resize((resolution, resolution), Image.Resampling.BOX)


def images(numbers, resolution, seed=0):
    """float32 [B, 3, R, R] in [−1, 1]."""
    pictures = [torch.tensor(list(picture(i, resolution, seed).tobytes())) for i in numbers]
    return torch.stack(pictures).view(-1, resolution, resolution, 3).permute(0, 3, 1, 2) / 127.5 - 1


class Figures(Source):
    """A source of figures in memory. Those of evaluation have another seed."""

    def __init__(self, resolution, seed=0):
        super().__init__("figures", resolution, seed)

    def draw(self, numbers, seed):
        captions = [caption(i, seed) for i in numbers]
        return Batch(images(numbers, self.resolution, seed), captions, collections.Counter())

    def batches(self, steps, batch, rank, world_size):
        for step in steps:
            yield self.draw(sample_indices(step, batch, rank, world_size), self.seed)

    def examples(self, held_out=False, rank=0, world_size=1):
        for number in () if held_out else itertools.count(rank, world_size):
            yield images([number], self.resolution, self.seed + 1)[0], [caption(number, self.seed + 1)]


def write(folder, count=48, resolution=32, seed=0):
    """Figures as PNG files with their captions in .txt files → the folder."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        picture(i, resolution, seed).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(caption(i, seed), encoding="utf-8")
    return folder


@functools.cache
def folder():
    """A folder of figures that this process's tests share."""
    parent = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, parent)
    return write(parent / "figures")


@functools.cache
def few_emoji(names=8):
    """A shard of all the pictures of so many emoji, which this process's tests share → the path."""
    path = folder().parent / "emoji.tar.gz"
    with tarfile.open(SHARD) as whole, tarfile.open(path, "w:gz") as some:
        content = {member: whole.extractfile(member).read() for member in whole}
        name_of = {m.name.partition(".")[0]: json.loads(x)["name"] for m, x in content.items() if ".json" in m.name}
        kept = list(dict.fromkeys(name_of.values()))[:names]
        for member, its in content.items():
            if name_of[member.name.partition(".")[0]] in kept:
                some.addfile(member, io.BytesIO(its))
    return path


def moved(network, by=0.1):
    """The network with every weight moved, also those that start at zero, so that no branch is silent."""
    for parameter in network.parameters():
        parameter.data += by * torch.randn_like(parameter)
    return network


@functools.cache
def generator_file():
    """A generator of `tiny` with random weights, as a run saves it."""
    torch.manual_seed(0)
    generator = Generator(TINY.generator)
    for parameter in generator.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)  # else to-RGB, which starts at zero, would hide everything
    path = folder().parent / "generator_ema.safetensors"
    save_generator(path, *content(generator, load_clip("emoji"), 32, {"preset": "tiny", "images": 0}))
    return path


if __name__ == "__main__":
    import train

    sys.argv[1:] = ["--preset", "tiny", *sys.argv[1:]]
    train.main()
