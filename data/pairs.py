"""Reads an image and its caption from files as the web has them.

Pictures are broken, tiny, huge, grey, in CMYK, with 16 bits, transparent or animated; captions are empty, in any
encoding, or as long as a book. A pair is made fit for training, or it is unusable for one of CAUSES.
"""

import codecs
import contextlib
import functools
import io
import json
import re
import warnings
import zlib
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError, features

from data import svg

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".svg")
# Passed to every Image.open. Without it, Pillow detects an EPS by its content and starts Ghostscript on it.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", *["AVIF"] * features.check("avif"))
PNG = b"\x89PNG\r\n\x1a\n"  # its first bytes; bytes 24 and 25 are the bits of a value and the type of color
SHOWN = (b"eXIf", b"iCCP", b"gAMA", b"sRGB", b"cICP")  # chunks of a PNG that turn its picture or change its colors
BITS, WHITE_IS, PLANES = 258, 262, 284  # tags of a TIFF: 1 if the largest value is white; 2 if colors lie apart
CURVES = (1, 2, 4, 6, 13, 14, 15)  # numbers of transfer_curve near that of sRGB, and 2: not specified
MAX_FILE = 2**28  # bytes of an image that are read
MAX_PIXELS = 2**26  # of an image; more is a mistake or an attack
MAX_CAPTION = 1000  # characters; no CLIP reads more, and tokenizing a novel takes minutes
MAX_TEXT = 16 * MAX_CAPTION  # bytes of a caption file that are read
MAX_HEAD = 1000  # first bytes of a file, in which an SVG is recognized
MAX_FACTS = 2**24  # bytes of a .json that are read; some programs write the picture into it
LIMITS = {".txt": MAX_TEXT, ".json": MAX_FACTS} | dict.fromkeys(IMAGE_SUFFIXES, MAX_FILE)  # bytes that are read

warnings.filterwarnings("ignore", module="PIL")  # they name no file, and what cannot be read is counted
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26  # bytes; by default 1 MB, also of profiles
Image.MAX_IMAGE_PIXELS = None  # centre_square checks the size itself, before a pixel is decoded

CAUSES = (
    SHARD := "shards that are cut off or unreadable",
    DUPLICATE := "repeated names, or further images, of a sample in a shard",
    FILE := "files that could not be read",
    IMAGE := "broken images",
    FORMAT := "files that are no picture, or of a kind that is not read, such as JPEG 2000 or 32 bits: convert them to "
    "PNG of 8 bits",
    SMALL := "images that are too small",
    LARGE := "images that are too large",
    EMPTY := "empty captions",
    ENCODING := "captions that are not in UTF-8, or contain a NUL or escape character",
    NO_CAPTION := "images without a caption",
    NO_IMAGE := "captions without an image next to them",
    CLEAR := "images with transparency that show nothing on white",
    FIELD := ".json files that are not in JSON, or whose field for the caption is missing or is no text",
    LINK := "links to other files, or sparse files, in a shard",
    REFUSED := "drawings that are not in UTF-8, use other files, pictures, entities, text or CSS that is not read, "
    "show nothing, or take too long",
)


class Unusable(ValueError):
    """A pair cannot be used; the message is one of CAUSES."""


class Sample(NamedTuple):
    """The files of one picture, not decoded."""

    place: str  # for messages
    parts: dict  # {suffix: bytes}; None for a link and for a file that is not read
    shard: str = ""

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
    if any(suffix in LIMITS and data is None for suffix, data in sample.parts.items()):
        raise Unusable(LINK)
    if image is None:
        raise Unusable(NO_IMAGE)
    if caption is None:
        raise Unusable(NO_CAPTION)
    if len(image) == MAX_FILE:
        raise Unusable(LARGE)
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
    whole = len(data) < MAX_TEXT  # else the last character may be cut
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data[:MAX_TEXT], final=whole)
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
        head = data[:MAX_HEAD].replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xfe\xff \t\r\n")  # in UTF-8 or UTF-16
        if re.match(rb"<(\?xml|!--|!DOCTYPE svg|(\w+:)?svg)", head):
            image = ImageOps.fit(svg.render(data, resolution), (resolution, resolution), Image.Resampling.LANCZOS)
        else:
            image = decode(data, resolution)
    except Unusable:
        raise
    except svg.Refused as error:
        raise Unusable(REFUSED) from error
    except Exception as error:  # on broken files Pillow raises errors of every kind
        raise Unusable(FORMAT if isinstance(error, UnidentifiedImageError) else IMAGE) from error
    return to_tensor(image)


def to_tensor(image):
    """A PIL image in RGB → [3, H, W] in [−1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def decode(data, resolution):
    """The bytes of an image → its centre square, RGB. Errors outside the pixel data are repaired.

    Raises Unusable for an unsuitable size, and whatever Pillow raises.
    """
    try:
        return centre_square(data, resolution)
    except Unusable:
        raise
    except Exception:
        if data.startswith(PNG):
            return centre_square(repaired(data), resolution)
        # A JPEG without its end marker is complete if bytes added there do not change the picture.
        square, other = (centre_square(data + more + b"\xff\xd9", resolution) for more in (b"", b"\x55\xaa" * 32))
        if square.tobytes() != other.tobytes():
            raise
        return square


def centre_square(data, resolution):
    """As decode, without repairs. The picture is upright, in sRGB and on white; 16 bits become 8, and of an animation
    the first frame is read.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if min(image.size) < resolution:
            raise Unusable(SMALL)
        if image.width * image.height > MAX_PIXELS:
            raise Unusable(LARGE)
        image.draft(None, (4 * resolution, 4 * resolution))  # a large JPEG is decoded at a fraction of its size
        image.load()  # a TIFF is upright from here on
        facts = dict(image.info)
        with contextlib.suppress(Exception):  # an EXIF tag of a wrong type raises any error, after the image is turned
            ImageOps.exif_transpose(image, in_place=True)
        image = on_white(in_8_bits(image, data))
        return in_srgb(image, resolution, facts.get("icc_profile"), 0 if "srgb" in facts else facts.get("gamma", 0))


def in_8_bits(image, data):
    """An image with up to 8 bits in each value, and a transparency that fits them. Raises Unusable.

    data: the bytes of its file, for what Pillow does not tell.
    """
    is_16_bit = image.mode.startswith("I;16")
    if image.mode in ("F", "I"):
        raise Unusable(FORMAT)  # it is unknown which value is white
    if image.format == "TIFF" and is_16_bit and (image.tag_v2.get(WHITE_IS), image.tag_v2.get(BITS)) != (1, (16,)):
        raise Unusable(FORMAT)  # Pillow reads the numbers, and not what they mean
    if image.format == "TIFF" and image.tag_v2.get(PLANES) == 2 and 16 in image.tag_v2.get(BITS, ()):
        raise Unusable(FORMAT)  # Pillow mixes the planes of 16 bits up
    if image.format == "PNG" and data[24] != 8 and data[25] in (0, 2) and image.has_transparency_data:
        if data[24] == 16:  # Pillow compares pixels of 8 bits with a transparent color of other bits
            raise Unusable(FORMAT)
        image.info["transparency"] *= 255 // (2 ** data[24] - 1)
    if image.format in ("PNG", "AVIF") and transfer_curve(data) not in CURVES:
        raise Unusable(FORMAT)  # such as HDR, whose curve is PQ or HLG
    if image.format == "BMP" and image.mode == "RGBA" and image.getextrema()[3] == (0, 0):
        return image.convert("RGB")  # many programs leave the fourth byte of a pixel at zero
    return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)) if is_16_bit else image


def transfer_curve(data):
    """The number of the transfer curve in a PNG or AVIF (ITU-T H.273), which Pillow ignores; 2 if the file has none."""
    if (at := data.find(b"cICP", 0, data.find(b"IDAT"))) > 0:
        return data[at + 5]
    at = data.find(b"colrnclx", 0, data.find(b"mdat"))
    return int.from_bytes(data[at + 10 : at + 12]) if at > 0 else 2


def on_white(image):
    """An image without transparency, in RGB, L or CMYK. Raises Unusable if it shows nothing."""
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        if image.convert("L").getextrema() == (255, 255):
            raise Unusable(CLEAR)
    return image if image.mode in ("L", "CMYK") else image.convert("RGB")


def in_srgb(image, resolution, profile, gamma):
    """The centre square of an image, resized, in sRGB. profile: an ICC profile as bytes; gamma: a PNG's, or 0."""
    if profile and profile[16:20] == b"GRAY" and not np.ptp(np.asarray(image.convert("RGB")), axis=-1).any():
        image = image.convert("L")  # of a palette, or with alpha
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    with contextlib.suppress(ImageCms.PyCMSError, OSError, TypeError, ValueError):
        if profile:
            return ImageCms.applyTransform(image, to_srgb(profile, image.mode))
    image = image.convert("RGB")
    if gamma and not profile:
        image = image.point([round(255 * (value / 255) ** (1 / (2.2 * gamma))) for value in range(256)] * 3)
    return image


@functools.lru_cache(maxsize=16)
def to_srgb(profile, mode):
    """The transform from an ICC profile, given as bytes. Raises what ImageCms raises."""
    return ImageCms.buildTransform(io.BytesIO(profile), ImageCms.createProfile("sRGB"), mode, "RGB")


def repaired(png):
    """A PNG file without the chunks that change nothing of its picture, and without those of SHOWN whose checksum is
    wrong. A chunk is its length, kind, data and checksum.
    """
    kept, at = png[: len(PNG)], len(PNG)
    while chunk := png[at : at + 12 + int.from_bytes(png[at : at + 4])]:
        is_whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if chunk[4:5].isupper() or chunk[4:8] == b"tRNS" or (chunk[4:8] in SHOWN and is_whole):
            kept += chunk
        at += len(chunk)
    return kept
