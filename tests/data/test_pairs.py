"""Images and captions as the web has them: read right, or skipped for a cause that is told; never anything else."""

import collections
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from clip import load_clip
from data import pairs
from data.pairs import CAUSES, EMPTY, ENCODING, FORMAT, IMAGE, LARGE, SMALL, Tally, Unusable, captions_of, read_image
from tests.data.test_sources import jpeg


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(content, resolution=8):
    return read_image(io.BytesIO(content), resolution)


def gray(value):
    return torch.full((3, 8, 8), value / 127.5 - 1)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(Image.new("L", (20, 50), 200)), 200),
        (encoded(Image.new("1", (20, 50), 1)), 255),
        (encoded(Image.fromarray(np.full((20, 50), 200 * 257, np.uint16))), 200),
        (encoded(Image.new("RGBA", (20, 50), (1, 2, 3, 0))), 255),
        (encoded(Image.new("LA", (20, 50), (9, 0))), 255),
        (encoded(Image.new("P", (20, 50), 0), transparency=0), 255),
        (jpeg((55, 55, 55, 0), mode="CMYK"), 200),
        (encoded(Image.new("L", (20, 50), 200), "GIF", save_all=True, append_images=[Image.new("L", (20, 50))]), 200),
        (encoded(Image.new("RGB", (20, 50), (200,) * 3), "WEBP", lossless=True), 200),
        (encoded(Image.new("L", (4000, 3000), 200), "JPEG"), 200),
    ],
    ids=["L", "1", "16 bits", "RGBA", "LA", "P", "CMYK", "animation", "WebP", "12 megapixels"],
)
def test_pictures_of_every_kind_are_read_right(content, expected):
    torch.testing.assert_close(read(content), gray(expected), rtol=0, atol=2 / 127.5)


def test_a_picture_is_cut_to_its_centre_and_upright():
    image = Image.new("RGB", (30, 10), "white")
    image.paste("red", (10, 0, 20, 5))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    upright, turned = read(encoded(image), 10), read(encoded(image, exif=exif), 10)
    assert (upright[1, :5] == -1).all() and (upright[1, 5:] == 1).all()
    torch.testing.assert_close(turned, upright.flip(1, 2))


def bomb(side):
    """A PNG whose header promises side × side pixels and whose data never comes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", IMAGE),
        (b"<html>", IMAGE),
        (jpeg((1, 2, 3))[:200], IMAGE),
        (jpeg((1, 2, 3), size=(7, 100)), SMALL),
        (encoded(Image.new("1", (1, 1))), SMALL),
        (bomb(100_000), LARGE),
        (bomb(2**31 - 1), LARGE),
        (bomb(100), IMAGE),
    ],
    ids=["empty", "HTML", "cut", "narrow", "a pixel", "bomb", "larger bomb", "no data"],
)
def test_what_cannot_be_used_is_told_by_its_cause(content, cause):
    with pytest.raises(Unusable, match=f"^{cause}$"):
        read(content)


@pytest.mark.parametrize(("is_built_in", "cause"), [(True, IMAGE), (False, FORMAT)])
def test_what_this_pillow_cannot_read_is_not_called_broken(monkeypatch, is_built_in, cause):
    """An AVIF, where Pillow was built without; where it was built with it, such a file is a broken one."""
    monkeypatch.setattr(pairs.features, "check", lambda _: is_built_in)
    with pytest.raises(Unusable, match=f"^{cause}$"):
        read(b"\0\0\0\x20ftypavif" + bytes(50))


def test_five_thousand_hostile_images_do_no_harm():
    """Whole files with bytes changed, cut, doubled or swapped; each is read, or skipped for a cause."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    seeds = [
        encoded(noise, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")
    ]  # small, so that every part of a file is hit
    seeds += [encoded(noise.convert("CMYK"), "JPEG"), encoded(noise.convert("P"), "PNG", transparency=3)]
    outcomes = collections.Counter()
    for i in range(5000):
        content = bytearray(seeds[i % len(seeds)])
        for _ in range(rng.integers(1, 9)):
            at = int(rng.integers(len(content))) if rng.random() < 0.5 else int(rng.integers(min(64, len(content))))
            match rng.integers(4):
                case 0:
                    content[at] = rng.integers(256)
                case 1:
                    del content[max(at, 8) :]
                case 2:
                    content[at:at] = content[at : at + 40]
                case 3:
                    content[at : at + 4] = bytes([255, 255, 255, rng.integers(256)])[: len(content) - at]
        try:
            image = read(bytes(content))
            assert image.shape == (3, 8, 8) and image.isfinite().all()
            outcomes["read"] += 1
        except Unusable as error:
            outcomes[str(error)] += 1
    assert outcomes["read"] > 100 and outcomes[IMAGE] > 1000 and set(outcomes) <= {"read", *CAUSES}


def test_captions_are_cleaned_and_cut():
    assert captions_of(b"\xef\xbb\xbf a  cat\ton a\0mat \r\n\n a dog\na dog") == ["a cat on a mat", "a dog", "a dog"]
    assert captions_of("日".encode() * 10_000_000) == ["日" * pairs.MAX_CAPTION]
    for content in (b"", b" \n", b"\0"):
        with pytest.raises(Unusable, match=f"^{EMPTY}$"):
            captions_of(content)
    for content in (b"\xff\xfe\xff", b"caf\xe9", b"cut \xe6\x97"):
        with pytest.raises(Unusable, match=f"^{ENCODING}$"):
            captions_of(content)


def test_a_thousand_hostile_captions_do_no_harm():
    """Any bytes at all become a caption that CLIP takes in, or are skipped."""
    rng, clip = np.random.default_rng(0), load_clip("emoji")
    pieces = [
        "<start_of_text>",
        "<end_of_text>",
        "&lt;",
        "🦖",
        "\u202e",
        "a\u0301" * 50,
        "٣",
        "日本",
        "x" * 5000,
        "\0",
        "'\"\\",
    ]
    taken = []
    for i in range(1000):
        if i % 2:
            content = "".join(rng.choice(pieces, rng.integers(1, 30))).encode()
        else:
            content = rng.bytes(int(rng.integers(1, 60)))
        try:
            taken += captions_of(content)
        except Unusable:
            continue
    assert len(taken) > 400
    ids = clip.tokenize(taken)
    assert ids.shape == (len(taken), clip.context_length)
    assert clip.encode_text(ids).embedding.isfinite().all()


def test_a_source_may_hold_rubbish_but_not_mostly():
    tally = Tally("some")
    for i in range(3000):
        tally.skip(IMAGE) if i % 5 < 2 else tally.use()
    assert tally.take() == {IMAGE: 1200} and not tally.take()
    with pytest.raises(pairs.UserError, match=r"--data some: only \d+ of 200 pairs in a row are usable: \d+ captions"):
        for _ in range(400):
            tally.skip(EMPTY)
