"""A pair of an image and its caption, read from files as the web has them, and the count of what is of no use.

Pictures come broken, tiny, huge, grey, in CMYK, with 16 bits, transparent or animated; captions empty, in any encoding,
or as long as a book. A pair is made fit for training, or it is skipped, and counted by cause.
"""

import codecs
import collections

import numpy as np
import torch
from PIL import Image, ImageOps

from common.cli import UserError

MAX_PIXELS = 2**26  # of an image; more is a mistake or an attack
MAX_CAPTION = 1000  # characters; no CLIP reads as many, and tokenizing a novel takes minutes
MAX_TEXT = 16 * MAX_CAPTION  # bytes of a caption file that are read
WINDOW = 200  # pairs; a source of which most of so many in a row are of no use is not worth going on with

Image.MAX_IMAGE_PIXELS = None  # decode looks itself, before a pixel is decoded

CAUSES = SHARD, DUPLICATE, IMAGE, SMALL, LARGE, CAPTION = (
    "shards cut off or not readable",
    "file names that a shard has twice",
    "images not readable",
    "images too small",
    "images too large",
    "captions empty or not UTF-8",
)


class Unusable(ValueError):
    """A pair cannot be used; the message is one of CAUSES."""


class Tally:
    """Counts what a source passes over, by cause. Raises UserError where that is most of what it holds."""

    def __init__(self, name):
        self.name = name
        self.skipped = collections.Counter()  # since the last batch
        self.window = collections.Counter()

    def use(self):
        self.window["used"] += 1
        self.judge()

    def skip(self, cause):
        self.skipped[cause] += 1
        self.window[cause] += 1
        self.judge()

    def judge(self):
        if self.window.total() < WINDOW:
            return
        if self.window["used"] < WINDOW / 2:
            causes = ", ".join(f"{count} {cause}" for cause, count in self.window.most_common() if cause != "used")
            used = self.window["used"]
            raise UserError(f"--data {self.name}: only {used} of {WINDOW} pairs in a row are usable: {causes}")
        self.window.clear()

    def take(self):
        """What was skipped since the last call."""
        skipped, self.skipped = self.skipped, collections.Counter()
        return skipped


def read_captions(path):
    """The captions in a file, see captions_of. Raises Unusable."""
    try:
        with path.open("rb") as file:
            return captions_of(file.read(MAX_TEXT))
    except OSError as error:
        raise Unusable(CAPTION) from error


def captions_of(data):
    """The bytes of a text → its captions, one a line, each of at most MAX_CAPTION characters.

    A line that stands twice is drawn twice as often. Raises Unusable where the text is not UTF-8, or empty.
    """
    whole = len(data) < MAX_TEXT  # else the last character may be cut
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data[:MAX_TEXT], final=whole)
    except UnicodeDecodeError as error:
        raise Unusable(CAPTION) from error
    lines = (" ".join(line.split())[:MAX_CAPTION] for line in text.replace("\0", " ").splitlines())
    if not (captions := [line for line in lines if line]):
        raise Unusable(CAPTION)
    return captions


def read_image(file, resolution):
    """An image file → its centre square [3, R, R] in [−1, 1]. Raises Unusable."""
    try:
        image = decode(file, resolution)
    except Unusable:
        raise
    except Exception as error:  # Pillow stumbles over broken files in every way there is
        raise Unusable(IMAGE) from error
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def decode(file, resolution):
    """An image file → RGB: upright, 16 bits narrowed to 8, what is transparent white, of an animation the first frame.

    Raises Unusable for a size that does not serve, and whatever Pillow raises.
    """
    with Image.open(file) as image:
        if min(image.size) < resolution:
            raise Unusable(SMALL)
        if image.width * image.height > MAX_PIXELS:
            raise Unusable(LARGE)
        image.draft(None, (4 * resolution, 4 * resolution))  # a large JPEG is decoded at a fraction of its size
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
