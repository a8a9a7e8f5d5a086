"""Reads an image and its caption from files as the web has them.

Pictures are broken, tiny, huge, grey, in CMYK, with 16 bits, transparent or animated; captions are empty, in any
encoding, or as long as a book. A pair is made fit for training, or it is unusable for one of CAUSES.
"""

import contextlib
import io
import json
import re
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features

from data import svg

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".svg")
SUFFIXES = (".txt", ".json", *IMAGE_SUFFIXES)  # of the files that are read
# Passed to every Image.open. Without it, Pillow detects an EPS by its content and starts Ghostscript on it.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", *["AVIF"] * features.check("avif"))
MAX_FILE = 2**28  # bytes of a file that are read
MAX_PIXELS = 2**26  # of an image; more is a mistake or an attack
MAX_CAPTION = 1000  # characters; no CLIP reads more, and tokenizing a novel takes minutes
MAX_TEXT = 16 * MAX_CAPTION  # characters of all captions of a picture

warnings.filterwarnings("ignore", module="PIL")  # they name no file, and what cannot be read is counted
Image.MAX_IMAGE_PIXELS = None  # decode checks the size itself, before a pixel is decoded

CAUSES = (
    SHARD := "shards that are cut off or unreadable",
    DUPLICATE := "repeated names, or further images, of a sample in a shard",
    FILE := "files that could not be read",
    IMAGE := "broken images",
    FORMAT := "files that are no picture, or of a kind that is not read; convert them to PNG of 8 bits",
    SMALL := "images that are too small",
    LARGE := "images that are too large",
    EMPTY := "empty captions",
    ENCODING := "captions that are not in UTF-8, or contain a NUL or escape character",
    NO_CAPTION := "images without a caption (links in a shard are not followed)",
    NO_IMAGE := "captions without an image next to them (links in a shard are not followed)",
    CLEAR := "images with transparency that show nothing on white",
    FIELD := ".json files that are not in JSON, or whose field for the caption is missing or is no text",
    REFUSED := "drawings that use other files, pictures, entities or text, show nothing, or take too long",
)


class Unusable(ValueError):
    """A pair cannot be used; the message is one of CAUSES."""


class Sample(NamedTuple):
    """The files of one picture, not decoded."""

    place: str  # for messages
    parts: dict  # {suffix: bytes}; None for a link and for a file that is not read

    @property
    def image(self):
        return next((self.parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in self.parts), None)

    @property
    def facts(self):
        """The fields of the .json."""
        return facts_of(self.parts.get(".json"))

    @property
    def size(self):
        return sum(len(data) for data in self.parts.values() if data)


def read_pair(sample, resolution, caption_key=None):
    """A Sample → (image [3, R, R], captions). Raises Unusable.

    caption_key: the field of the .json that contains the caption; by default the .txt contains it.
    """
    image, caption = sample.image, sample.parts.get(".json" if caption_key else ".txt")
    if image is None:
        raise Unusable(NO_IMAGE)
    if caption is None:
        raise Unusable(NO_CAPTION)
    captions = captions_in(caption, caption_key) if caption_key else captions_of(caption)
    return read_image(io.BytesIO(image), resolution), captions


def facts_of(data):
    """The bytes of a .json → its fields as a dict, {} if it cannot be read."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(facts := json.loads(data or b""), dict):
            return facts
    return {}


def captions_in(data, key):
    """The captions in a field of a .json, given as bytes: a text with one caption a line, or a list of texts.

    Raises Unusable.
    """
    value = facts_of(data).get(key)
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise Unusable(FIELD)
    return captions_of("\n".join(texts).encode(errors="surrogatepass"))  # half of a pair of UTF-16 is not UTF-8


def captions_of(data):
    """The bytes of a text → its captions, one a line, each of at most MAX_CAPTION characters.

    A repeated line is drawn more often. Raises Unusable if the text is not in UTF-8, contains a NUL or nothing visible.
    """
    try:
        text = data.decode("utf-8-sig")[:MAX_TEXT]
    except UnicodeDecodeError as error:
        raise Unusable(ENCODING) from error
    if "\0" in text or "\x1b" in text:  # UTF-16 without a byte order mark has the first, ISO-2022-JP the second
        raise Unusable(ENCODING)
    lines = re.split(r"\r\n|\r|\n", text)  # no other character ends a line
    lines = [" ".join(line.split())[:MAX_CAPTION] for line in lines]
    if not (captions := [line for line in lines if shows_something(line)]):
        raise Unusable(EMPTY)
    return captions


def shows_something(text):
    """Whether a text contains a visible character; a space and U+200B are not visible."""
    return any(character.isprintable() and character != " " for character in text)


def read_image(file, resolution):
    """An image file → its centre square [3, R, R] in [−1, 1]. Raises Unusable."""
    data = file.read()
    try:
        if re.match(rb"(\xef\xbb\xbf)?\s*<(\?xml|!--|!DOCTYPE svg|(\w+:)?svg)", data):
            return to_tensor(centre_square(svg.render(data, resolution), resolution))
        return to_tensor(decode(data, resolution))
    except Unusable:
        raise
    except svg.Refused as error:
        raise Unusable(REFUSED) from error
    except UnidentifiedImageError as error:
        raise Unusable(FORMAT) from error
    except Exception as error:  # on broken files Pillow raises errors of every kind
        raise Unusable(IMAGE) from error


def to_tensor(image):
    """A PIL image in RGB → [3, H, W] in [−1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def centre_square(image, resolution):
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)


def decode(data, resolution):
    """The bytes of an image → its centre square, upright and on white; of an animation, of the first frame.

    Raises Unusable for an unsuitable size or kind, and whatever Pillow raises.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if min(image.size) < resolution:
            raise Unusable(SMALL)
        if image.width * image.height > MAX_PIXELS:
            raise Unusable(LARGE)
        image.draft(None, (4 * resolution, 4 * resolution))  # a large JPEG is decoded at a fraction of its size
        image.load()  # a TIFF is upright from here on
        if image.mode in ("F", "I"):  # it is unknown which value is white
            raise Unusable(FORMAT)
        with contextlib.suppress(Exception):  # an EXIF tag of a wrong type raises any error, after the image is turned
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        return centre_square(on_white(image), resolution)


def on_white(image):
    """An image in RGB without transparency. Raises Unusable if it shows nothing."""
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        if image.convert("L").getextrema() == (255, 255):
            raise Unusable(CLEAR)
    return image.convert("RGB")
