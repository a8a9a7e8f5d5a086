"""Images and captions as the web has them: each is read correctly, or unusable for one of CAUSES."""

import io
import struct
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from data import pairs, svg
from data.pairs import EMPTY, ENCODING, FORMAT, IMAGE, LARGE, REFUSED, SMALL, Unusable, captions_of, read_image
from tests.data.files import encoded, jpeg


def read(content, resolution=8):
    return read_image(io.BytesIO(content), resolution)


def gray(value):
    return torch.full((3, 8, 8), value / 127.5 - 1)


def drawing(inside="", box="0 0 20 50", head=""):
    """An SVG, gray unless something is drawn over it."""
    start = f'{head}<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">'
    return f'{start}<rect width="100%" height="100%" fill="#c8c8c8"/>{inside}</svg>'.encode()


KINDS = {
    "L": encoded(Image.new("L", (20, 50), 200)),
    "16 bits": encoded(Image.fromarray(np.full((20, 50), 200 * 257, np.uint16))),
    "RGBA": encoded(Image.new("RGBA", (20, 50), (200, 200, 200, 255))),
    "CMYK": jpeg((55, 55, 55, 0), mode="CMYK"),
    "animation": encoded(Image.new("L", (20, 50), 200), "GIF", save_all=True, append_images=[Image.new("L", (20, 50))]),
    "WebP": encoded(Image.new("RGB", (20, 50), (200,) * 3), "WEBP", lossless=True),
    "SVG": drawing('<g id="a"/><use href="#a"/>', head='<?xml version="1.0"?><!DOCTYPE svg>\n'),
    "wide SVG": drawing(box="0 0 100 20"),
}


def clear(opaque_corner):
    """A transparent picture; the corner is outside of the centre square."""
    image = Image.new("RGBA", (20, 50), (1, 2, 3, 0))
    if opaque_corner:
        image.putpixel((0, 0), (1, 2, 3, 255))
    return encoded(image)


def test_pictures_of_every_kind_are_read_correctly():
    for content in KINDS.values():
        torch.testing.assert_close(read(content), gray(200), rtol=0, atol=2 / 127.5)
    assert torch.equal(read(clear(opaque_corner=True)), gray(255))


def test_a_picture_is_cut_to_its_centre_and_upright():
    image = Image.new("RGB", (30, 10), "white")
    image.paste("red", (10, 0, 20, 5))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    upright = read(encoded(image), 10)
    assert (upright[1, :5] == -1).all() and (upright[1, 5:] == 1).all()
    for kind in ("PNG", "TIFF"):
        content = encoded(image, kind, exif=exif)
        torch.testing.assert_close(read(content, 10), upright.flip(1, 2), atol=0.02, rtol=0)


def bomb(side):
    """A BMP whose header promises side × side pixels, which never come."""
    content = encoded(Image.new("RGB", (20, 20)), "BMP")
    return content[:18] + struct.pack("<2i", side, side) + content[26:]


def uses(levels, times=10):
    """An element drawn times ** levels times, by nested references."""
    groups = (f'<g id="a{i + 1}">{times * f"""<use href="#a{i}"/>"""}</g>' for i in range(levels))
    return f'<defs><rect id="a0" width="1" height="1"/>{"".join(groups)}</defs><use href="#a{levels}"/>'


REFUSED_SVGS = [  # that refer to files, expand, or take resvg terabytes or for ever
    drawing(head="<!-- a comment -->", inside='<image xlink:href="/etc/passwd"/>'),
    drawing("<rect fill=\"url( 'a.svg#b' )\"/>"),
    drawing("<style>rect { fill: url(http://example.org/a.svg#b) }</style>"),
    drawing("<script>alert(1)</script>"),
    drawing("&a;", head='<!DOCTYPE svg [<!ENTITY a SYSTEM "/etc/passwd">]>'),
    drawing(uses(7)),
    drawing('<g id="a"><use href="#a"/></g>'),
    drawing("<g>" * 100_000 + "</g>" * 100_000),
    drawing(box="0 0 1 1000000"),
    drawing(" " * svg.MAX_BYTES),
    drawing('<pattern id="p" width="1000" height="1000"><rect/></pattern><rect fill="url(#p)"/>'),
    drawing('<path d="M0 0A1e30 1e30 0 0 1 9 9"/>'),
    drawing('<circle r="100000000" stroke="red"/>'),
    drawing(head='<?xml-stylesheet href="style.css"?>'),
    drawing("<style>@import 'style.css'; rect { fill: red }</style>"),
]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", FORMAT),
        (jpeg((1, 2, 3))[:-20], IMAGE),
        (jpeg((1, 2, 3), size=(7, 100)), SMALL),
        (bomb(100_000), LARGE),
        (encoded(Image.fromarray(np.full((20, 20), 0.5, np.float32)), "TIFF"), FORMAT),
        (encoded(Image.new("RGB", (20, 20)), "EPS"), FORMAT),  # Pillow would start Ghostscript on it
        (clear(opaque_corner=False), pairs.CLEAR),
        (b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><g/></svg>', REFUSED),
        *((content, REFUSED) for content in REFUSED_SVGS),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><g>', IMAGE),
    ],
)
def test_unusable_images_have_their_true_cause(content, cause, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    with pytest.raises(Unusable, match=f"^{cause}$"):
        read(content)


def test_svgs_with_styles_links_and_repeated_elements_are_drawn():
    circle = '<circle cx="10" cy="20" r="30" {}/>'
    red = read(drawing(circle.format('fill="red"')))
    by_class = "<style>.a { fill: red }</style>" + circle.format('class="a"')
    linked = '<a href="https://example.org">' + circle.format('style="fill:red"') + "</a>"
    like_numbers = circle.format('fill="red" stroke="#1e9000" stroke-width="1e-9" id="a12345678"')
    for content in (by_class, linked, like_numbers):
        assert torch.equal(read(drawing(content)), red)
    torch.testing.assert_close(read(drawing(uses(2))), read(drawing('<rect width="1" height="1"/>')))


def test_an_error_of_resvg_itself_is_no_end(monkeypatch):
    class PanicException(BaseException): ...

    monkeypatch.setattr(svg.resvg_py, "svg_to_bytes", mock.Mock(side_effect=PanicException))
    with pytest.raises(Unusable, match=REFUSED):
        read(drawing("<rect/>"))


def test_hostile_images_do_no_harm():
    """Files with bytes changed, or cut: each is read, or unusable for a known cause."""
    rng, read_ones = np.random.default_rng(0), 0
    noise = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))  # small, so that every part of a file is hit
    files = [encoded(noise, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")] + [drawing(uses(2))]
    for i in range(600):
        content = bytearray(files[i % len(files)])
        for at in rng.integers(min(64, len(content)) if i % 4 else len(content), size=4):
            content[at] = rng.integers(256)
        try:
            image = read(bytes(content[: rng.integers(len(content))] if i % 3 == 0 else content))
            assert image.shape == (3, 8, 8) and image.isfinite().all()
            read_ones += 1
        except Unusable as error:
            assert str(error) in pairs.CAUSES
    assert 20 < read_ones < 580


def test_captions_are_cleaned_and_cut():
    assert captions_of(b"\xef\xbb\xbf a  cat\ton a mat \r\n\n a dog\na dog") == ["a cat on a mat", "a dog", "a dog"]
    assert captions_of(b"a" * 10_000) == ["a" * pairs.MAX_CAPTION]
    for content, cause in (
        (b" \n", EMPTY),
        ("\u200b\ufeff".encode(), EMPTY),
        (b"caf\xe9", ENCODING),
        ("red".encode("utf-16-le"), ENCODING),
    ):
        with pytest.raises(Unusable, match=f"^{cause}$"):
            captions_of(content)
