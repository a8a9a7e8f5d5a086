"""A pair of an image and its caption, read from files as the web has them, and the count of what is of no use.

Pictures come broken, tiny, huge, grey, in CMYK, with 16 bits, transparent or animated; captions empty, in any encoding,
or as long as a book. A pair is made fit for training, or it is skipped, and counted by cause.
"""

import codecs
import collections
import contextlib
import functools
import io
import json
import re

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, features

from common.cli import UserError
from data import svg

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".svg")
# Named wherever a picture is opened: else Pillow knows an EPS by its content, and starts Ghostscript on it.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", *["AVIF"] * features.check("avif"))
PNG = b"\x89PNG\r\n\x1a\n"  # its first bytes
TURNS = {  # what makes a picture upright, by its orientation in EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_FILE = 2**28  # bytes of an image that are read
MAX_PIXELS = 2**26  # of an image; more is a mistake or an attack
MAX_CAPTION = 1000  # characters; no CLIP reads as many, and tokenizing a novel takes minutes
MAX_TEXT = 16 * MAX_CAPTION  # bytes of a caption file that are read
MAX_HEAD = 1000  # bytes in which an SVG says that it is one
MAX_FACTS = 2**20  # bytes of a .json that are read
WINDOW, ENOUGH = 1000, 10  # pairs in a row, of so many shards; if most are of no use, the source is given up

Image.MAX_IMAGE_PIXELS = None  # decode looks itself, before a pixel is decoded

CAUSES = (
    SHARD := "shards cut off or not readable",
    DUPLICATE := "file names that a shard has twice",
    FILE := "files that the disk did not give",
    IMAGE := "images broken",
    FORMAT := "images of a kind that this Pillow cannot read",
    SMALL := "images too small",
    LARGE := "images too large",
    EMPTY := "captions empty",
    ENCODING := "captions not in UTF-8",
    NO_CAPTION := "images without a caption",
    NO_IMAGE := "captions without an image",
    FIELD := ".json files without the caption's field",
    LINK := "links to other files of a shard",
    REFUSED := "drawings that refer to other files, hold letters, or take too long",
)


class Unusable(ValueError):
    """A pair cannot be used; the message is one of CAUSES."""


class Tally:
    """Counts what a source passes over, by cause. Raises UserError where that is most of what it holds.

    num_shards: of the source. A shard of little use, read from its front to its end, is not most of them.
    """

    def __init__(self, name, num_shards=1):
        self.name, self.num_shards = name, num_shards
        self.skipped, self.notes = collections.Counter(), {}  # since the last batch
        self.first = {}  # cause: where it was met first, in words
        self.window, self.shards = collections.Counter(), set()  # what came of the last pairs, and whence they were

    def use(self, shard=""):
        self.count("used", shard)

    def skip(self, cause, where="", shard=""):
        if cause not in self.first:
            self.first[cause] = where
            self.notes[cause] = self.told({cause: 1})
        self.skipped[cause] += 1
        self.count(cause, shard)

    def count(self, outcome, shard):
        self.window[outcome] += 1
        self.shards.add(shard)
        number, used = self.window.total(), self.window["used"]
        if number >= WINDOW and len(self.shards) >= min(self.num_shards, ENOUGH):
            if used < number / 2:
                causes = self.told(self.window)
                raise UserError(f"--data {self.name}: only {used} of {number} pairs in a row are usable: {causes}")
            self.window.clear()
            self.shards.clear()

    def told(self, counts=None):
        """The causes in a count of them, by default what was skipped, each with where it was met first."""
        counts = collections.Counter(self.skipped if counts is None else counts)
        causes = [cause for cause, _ in counts.most_common() if cause != "used"]
        return ", ".join(f"{counts[cause]} {cause} (first: {self.first[cause]})" for cause in causes)

    def take(self):
        """What was skipped since the last call, and the notes on it."""
        taken = self.skipped, self.notes
        self.skipped, self.notes = collections.Counter(), {}
        return taken


def read_pair(image, text, facts, resolution, caption_key=None):
    """The bytes of an image, of a .txt and of a .json, each or None → (image [3, R, R], captions). Raises Unusable.

    caption_key: the field of the .json that holds the caption; without it the .txt does.
    """
    caption = facts if caption_key else text
    if image is None:
        raise Unusable(NO_IMAGE)
    if caption is None:
        raise Unusable(NO_CAPTION)
    if len(image) == MAX_FILE:
        raise Unusable(LARGE)
    captions = captions_in(facts, caption_key) if caption_key else captions_of(text)
    return read_image(io.BytesIO(image), resolution), captions


def facts_of(data):
    """What the bytes of a .json say, as a dict; one that cannot be read says nothing."""
    try:
        facts = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def captions_in(facts, key):
    """The captions in a field of a .json's bytes: a text of one caption a line, or a list of texts. Raises Unusable."""
    try:
        facts.decode(json.detect_encoding(facts))
    except UnicodeDecodeError as error:
        raise Unusable(ENCODING) from error
    value = facts_of(facts).get(key)
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise Unusable(FIELD)
    return captions_of("\n".join(texts).encode("utf-8", "replace"))


def where(cause, name, facts):
    """The place of an unusable pair, for the user; of one whose .json lacks the caption, the fields that it has."""
    fields = ", ".join(facts_of(facts)) if cause == FIELD else ""
    return f"{name} has {fields}" if fields else name


def captions_of(data):
    """The bytes of a text → its captions, one a line, each of at most MAX_CAPTION characters.

    A line that stands twice is drawn twice as often. Raises Unusable where the text is not UTF-8, or shows nothing.
    """
    whole = len(data) < MAX_TEXT  # else the last character may be cut
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data[:MAX_TEXT], final=whole)
    except UnicodeDecodeError as error:
        raise Unusable(ENCODING) from error
    if "\0" in text:  # UTF-16 without a mark: every other byte of English is zero
        raise Unusable(ENCODING)
    lines = [" ".join(line.split())[:MAX_CAPTION] for line in re.split(r"\r\n|\r|\n", text)]  # no other sign ends one
    if not (captions := [line for line in lines if shows_something(line)]):
        raise Unusable(EMPTY)
    return captions


def shows_something(text):
    """Whether any sign of a text can be seen; a space, or U+200B, cannot."""
    return any(sign.isprintable() and sign != " " for sign in text)


def read_image(file, resolution):
    """An image file → its centre square [3, R, R] in [−1, 1]. Raises Unusable."""
    data = file.read()
    try:
        if data[:MAX_HEAD].lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<svg", b"<?xml", b"<!DOCTYPE svg", b"<!--")):
            image = ImageOps.fit(svg.render(data, resolution), (resolution, resolution), Image.Resampling.LANCZOS)
        else:
            image = decode(data, resolution)
    except Unusable:
        raise
    except svg.Refused as error:
        raise Unusable(REFUSED) from error
    except Exception as error:  # Pillow stumbles over broken files in every way there is
        is_avif = data[8:12] in (b"avif", b"avis")  # and no HEIC, whatever the file is called
        is_readable = data[4:8] != b"ftyp" or (is_avif and "AVIF" in FORMATS)
        raise Unusable(IMAGE if is_readable else FORMAT) from error
    return to_tensor(image)


def to_tensor(image):
    """A PIL image in RGB → [3, H, W] in [−1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def decode(data, resolution):
    """The bytes of an image → its centre square, RGB. What fails beside the pixels does not lose the pixels.

    Raises Unusable for a size that does not serve, and whatever Pillow raises.
    """
    try:
        return centre_square(data, resolution)
    except Unusable:
        raise
    except Exception:
        if data.startswith(PNG):
            return centre_square(pixels_alone(data), resolution)
        # A JPEG without its end is whole if what is put there does not show.
        square, other = (centre_square(data + more + b"\xff\xd9", resolution) for more in (b"", b"\x55\xaa" * 32))
        if square.tobytes() != other.tobytes():
            raise
        return square


def centre_square(data, resolution):
    """As decode: upright, 16 bits narrowed to 8, what is transparent white, of an animation the first frame, and colors
    as in sRGB.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if min(image.size) < resolution:
            raise Unusable(SMALL)
        if image.width * image.height > MAX_PIXELS:
            raise Unusable(LARGE)
        image.draft(None, (4 * resolution, 4 * resolution))  # a large JPEG is decoded at a fraction of its size
        image.load()  # a TIFF is upright from here on
        profile, turn = image.info.get("icc_profile"), None
        with contextlib.suppress(Exception):  # a tag of a wrong type beside the orientation raises anything
            turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
        if turn is not None:
            image = image.transpose(turn)
        is_16_bit = image.mode.startswith("I;16")
        if image.mode in ("F", "I") or (is_16_bit and image.has_transparency_data):
            raise Unusable(FORMAT)  # 32 bits do not say which value is white
        if is_16_bit:
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode not in ("L", "CMYK"):
            image = image.convert("RGB")
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
        with contextlib.suppress(ImageCms.PyCMSError, OSError, TypeError, ValueError):
            if profile:
                return ImageCms.applyTransform(image, to_srgb(profile, image.mode))
        return image.convert("RGB")


@functools.lru_cache(maxsize=16)
def to_srgb(profile, mode):
    """The transform from the colors of an ICC profile, its bytes. Raises what ImageCms raises."""
    return ImageCms.buildTransform(io.BytesIO(profile), ImageCms.createProfile("sRGB"), mode, "RGB")


def pixels_alone(png):
    """A PNG file without the chunks that do not concern its pixels. A chunk is its length, kind, data and checksum."""
    kept, at = png[: len(PNG)], len(PNG)
    while chunk := png[at : at + 12 + int.from_bytes(png[at : at + 4])]:
        if chunk[4:5].isupper() or chunk[4:8] == b"tRNS":
            kept += chunk
        at += len(chunk)
    return kept
