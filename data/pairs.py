"""A pair of an image and its caption, read from files as the web has them, and the count of what is of no use.

Pictures come broken, tiny, huge, grey, in CMYK, with 16 bits, transparent or animated; captions empty, in any encoding,
or as long as a book. A pair is made fit for training, or it is skipped, and counted by cause.
"""

import codecs
import collections
import functools
import io
import json

import numpy as np
import resvg_py
import torch
from PIL import Image, ImageOps, features

from common.cli import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".svg")
MAX_FILE = 2**28  # bytes of an image that are read
MAX_PIXELS = 2**26  # of an image; more is a mistake or an attack
MAX_CAPTION = 1000  # characters; no CLIP reads as many, and tokenizing a novel takes minutes
MAX_TEXT = 16 * MAX_CAPTION  # bytes of a caption file that are read
MAX_HEAD = 1000  # bytes in which an SVG says that it is one
MAX_FACTS = 2**20  # bytes of a .json that are read
WINDOW = 200  # pairs; if most of so many in a row are unusable, the source is given up

Image.MAX_IMAGE_PIXELS = None  # decode looks itself, before a pixel is decoded

CAUSES = SHARD, DUPLICATE, FILE, IMAGE, FORMAT, SMALL, LARGE, EMPTY, ENCODING, NO_CAPTION, NO_IMAGE, FIELD = (
    "shards cut off or not readable",
    "file names that a shard has twice",
    "files that the disk did not give",
    "images broken",
    "images of a kind that this Pillow cannot read",
    "images too small",
    "images too large",
    "captions empty",
    "captions not in UTF-8",
    "images without a caption",
    "captions without an image",
    ".json files without the caption's field",
)


class Unusable(ValueError):
    """A pair cannot be used; the message is one of CAUSES."""


class Tally:
    """Counts what a source passes over, by cause. Raises UserError where that is most of what it holds."""

    def __init__(self, name):
        self.name = name
        self.skipped = collections.Counter()  # since the last batch
        self.window = collections.Counter()
        self.first = {}  # cause: where it was met first, in words

    def use(self):
        self.window["used"] += 1
        self.judge()

    def skip(self, cause, where=""):
        if where:
            self.first.setdefault(cause, where)
        self.skipped[cause] += 1
        self.window[cause] += 1
        self.judge()

    def judge(self):
        if self.window.total() < WINDOW:
            return
        if (used := self.window["used"]) < WINDOW / 2:
            causes = self.told(self.window)
            raise UserError(f"--data {self.name}: only {used} of {WINDOW} pairs in a row are usable: {causes}")
        self.window.clear()

    def told(self, counts):
        """The causes in a count of them, in words, each with where it was met first."""
        return ", ".join(
            f"{count} {cause}" + (f" (first: {self.first[cause]})" if self.first.get(cause) else "")
            for cause, count in counts.most_common()
            if cause != "used"
        )

    def take(self):
        """What was skipped since the last call."""
        skipped, self.skipped = self.skipped, collections.Counter()
        return skipped


def read_pair(image, text, facts, resolution, caption_key=None):
    """The bytes of an image, of a .txt and of a .json, each or None → (image [3, R, R], captions). Raises Unusable.

    caption_key: the field of the .json that holds the caption; without it the .txt does.
    """
    caption = facts if caption_key else text
    if image is None:
        raise Unusable(NO_IMAGE)
    if caption is None:
        raise Unusable(NO_CAPTION)
    captions = captions_in(facts_of(facts), caption_key) if caption_key else captions_of(text)
    return read_image(io.BytesIO(image), resolution), captions


def facts_of(data):
    """What the bytes of a .json say, as a dict; one that cannot be read says nothing."""
    try:
        facts = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def captions_in(facts, key):
    """The captions in a field of a .json: a text of one caption a line, or a list of texts. Raises Unusable."""
    value = facts.get(key)
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise Unusable(FIELD)
    return captions_of("\n".join(texts).encode("utf-8", "replace"))


def where(cause, name, facts):
    """The place of an unusable pair, for the user; of one whose .json lacks the caption, the fields that it has."""
    if cause != FIELD:
        return name
    return f"{name} has {fields}" if (fields := ", ".join(facts_of(facts))) else ""


def captions_of(data):
    """The bytes of a text → its captions, one a line, each of at most MAX_CAPTION characters.

    A line that stands twice is drawn twice as often. Raises Unusable where the text is not UTF-8, or empty.
    """
    whole = len(data) < MAX_TEXT  # else the last character may be cut
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data[:MAX_TEXT], final=whole)
    except UnicodeDecodeError as error:
        raise Unusable(ENCODING) from error
    lines = (" ".join(line.split())[:MAX_CAPTION] for line in text.replace("\0", " ").splitlines())
    if not (captions := [line for line in lines if line]):
        raise Unusable(EMPTY)
    return captions


def read_image(file, resolution):
    """An image file → its centre square [3, R, R] in [−1, 1]. Raises Unusable."""
    try:
        head = file.read(MAX_HEAD).lstrip()
        file.seek(0)
        image = render(file.read(), resolution) if head.startswith((b"<svg", b"<?xml")) else decode(file, resolution)
    except Unusable:
        raise
    except Exception as error:  # Pillow stumbles over broken files in every way there is
        file.seek(0)
        unread = is_avif(file.read(12)) and not features.check("avif")
        raise Unusable(FORMAT if unread else IMAGE) from error
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def render(svg, resolution):
    """The bytes of an SVG → RGB on white, its shorter side at the resolution. Raises what resvg raises."""
    draw = functools.partial(resvg_py.svg_to_bytes, svg.decode(), background="white", skip_system_fonts=True)
    image = Image.open(io.BytesIO(draw(width=resolution)))
    if image.height < resolution:  # a wide picture
        image = Image.open(io.BytesIO(draw(height=resolution)))
    return image.convert("RGB")


def is_avif(head):
    """Whether these are the first 12 bytes of an AVIF, which not every Pillow reads, whatever its name."""
    return head[4:] in (b"ftypavif", b"ftypavis")


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
        if image.mode == "F":
            raise Unusable(FORMAT)  # a float says not which value is white
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
