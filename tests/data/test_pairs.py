"""Images and captions as the web has them: each is read correctly, or unusable for one of CAUSES."""

import collections
import gzip
import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from data import pairs, svg
from data.pairs import CAUSES, EMPTY, ENCODING, FORMAT, IMAGE, LARGE, REFUSED, SMALL, Unusable, captions_of, read_image
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
    "16 bits in a TIFF": encoded(Image.fromarray(np.full((20, 50), 200 * 257, np.uint16)), "TIFF"),
    "16 bits": encoded(Image.fromarray(np.full((20, 50), 200 * 257, np.uint16))),
    "RGBA": encoded(Image.new("RGBA", (20, 50), (200, 200, 200, 255))),
    "CMYK": jpeg((55, 55, 55, 0), mode="CMYK"),
    "animation": encoded(Image.new("L", (20, 50), 200), "GIF", save_all=True, append_images=[Image.new("L", (20, 50))]),
    "WebP": encoded(Image.new("RGB", (20, 50), (200,) * 3), "WEBP", lossless=True),
    "12 megapixels": encoded(Image.new("L", (4000, 3000), 200), "JPEG"),
    "SVG": drawing('<g id="a"/><use href="#a"/>', head='<?xml version="1.0"?><!DOCTYPE svg>\n'),
    "wide SVG": drawing(box="0 0 100 20"),
    **({"AVIF": encoded(Image.new("L", (20, 50), 200), "AVIF")} if "AVIF" in pairs.FORMATS else {}),
}
CLEAR = {
    "RGBA": ((1, 2, 3, 0), (1, 2, 3, 255)),
    "LA": ((9, 0), (9, 255)),
    "P": (0, 1),
}


def clear(mode, opaque_corner):
    """A transparent picture; the corner is outside of the centre square."""
    transparent, opaque = CLEAR[mode]
    image = Image.new(mode, (20, 50), transparent)
    if opaque_corner:
        image.putpixel((0, 0), opaque)
    return encoded(image, **({"transparency": 0} if mode == "P" else {}))


WHITE = {
    "1": encoded(Image.new("1", (20, 50), 1)),
    "16 bits": encoded(Image.fromarray(np.full((20, 50), 65535, np.uint16))),
    **{mode: clear(mode, opaque_corner=True) for mode in CLEAR},
}


def test_pictures_of_every_kind_are_read_correctly():
    for content, expected in [*((c, 200) for c in KINDS.values()), *((c, 255) for c in WHITE.values())]:
        torch.testing.assert_close(read(content), gray(expected), rtol=0, atol=2 / 127.5)


def test_a_jpeg_that_is_cut_is_broken():
    with pytest.raises(Unusable, match=f"^{IMAGE}$"):
        read(KINDS["CMYK"][:-20])


def test_a_picture_is_cut_to_its_centre_and_upright():
    image = Image.new("RGB", (30, 10), "white")
    image.paste("red", (10, 0, 20, 5))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    upright = read(encoded(image), 10)
    assert (upright[1, :5] == -1).all() and (upright[1, 5:] == 1).all()
    for kind in ("PNG", "WEBP", "TIFF"):
        content = encoded(image, kind, exif=exif, lossless=True)
        torch.testing.assert_close(read(content, 10), upright.flip(1, 2), atol=0.02, rtol=0)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"?XYZ", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"?XYZ", b"bXYZ", 1)  # blue is red


def test_colors_are_read_as_their_profile_says():
    """An invalid profile, or one of other channels, is ignored."""
    image, grey = Image.new("RGB", (20, 20), (120, 200, 80)), Image.new("L", (20, 20), 90)
    for kind in ("PNG", "WEBP"):
        pixel = (read(encoded(image, kind, lossless=True, icc_profile=SWAPPED))[:, 0, 0] + 1) * 127.5
        torch.testing.assert_close(pixel, torch.tensor([80.0, 200, 120]), atol=2, rtol=0)
    for kind in ("PNG", "JPEG"):
        assert torch.equal(read(encoded(image, kind, icc_profile=b"none")), read(encoded(image, kind)))
    assert torch.equal(read(encoded(grey, icc_profile=SWAPPED)), read(encoded(grey)))


def bomb(side):
    """A BMP whose header promises side × side pixels, which never come."""
    content = encoded(Image.new("RGB", (20, 20)), "BMP")
    return content[:18] + struct.pack("<2i", side, side) + content[26:]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", FORMAT),
        (jpeg((1, 2, 3), size=(7, 100)), SMALL),
        (bomb(100_000), LARGE),
        (bomb(100), IMAGE),
        (encoded(Image.fromarray(np.full((20, 20), 70_000, np.int32)), "TIFF"), FORMAT),
        (encoded(Image.fromarray(np.full((20, 20), 0.5, np.float32)), "TIFF"), FORMAT),
        (b"\0\0\0\x18ftypheic" + bytes(99), FORMAT),
        (encoded(Image.new("RGB", (20, 20)), "EPS"), FORMAT),  # Pillow would start Ghostscript on it
        *((encoded(Image.new("RGB", (20, 20)), kind), FORMAT) for kind in ("PPM", "ICO", "JPEG2000")),
        (gzip.compress(drawing()), FORMAT),
        *((clear(mode, False), pairs.CLEAR) for mode in CLEAR),
        (b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><g/></svg>', REFUSED),
        (drawing("<g id='é'/>").decode().encode("latin-1"), IMAGE),
    ],
)
def test_unusable_images_have_their_true_cause(content, cause, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    with pytest.raises(Unusable, match=f"^{cause}$"):
        read(content)


def uses(levels, times=10):
    """An element drawn times ** levels times, by nested references."""
    groups = (f'<g id="a{i + 1}">{times * f"""<use href="#a{i}"/>"""}</g>' for i in range(levels))
    return f'<defs><rect id="a0" width="1" height="1"/>{"".join(groups)}</defs><use href="#a{levels}"/>'


@pytest.mark.parametrize(
    "content",
    [
        drawing(head="<!-- a comment -->", inside='<image href="/etc/passwd"/>'),
        drawing('<image xlink:href="file:///etc/passwd"/>'),
        drawing('<image href="https://example.org/a.png"/>'),
        drawing('<image href="data:image/png;base64,AAAA"/>'),
        drawing("<rect fill=\"url( 'a.svg#b' )\"/>"),
        drawing("<style>rect { fill: url(http://example.org/a.svg#b) }</style>"),
        drawing("<script>alert(1)</script>"),
        drawing('<text y="9">letters need a font</text>'),
        drawing("&a;", head='<!DOCTYPE svg [<!ENTITY a SYSTEM "/etc/passwd">]>'),
        drawing(uses(7)),
        drawing('<g id="a"><use href="#a"/></g>'),
        drawing("<g>" * 100_000 + "</g>" * 100_000),
        drawing(box="0 0 1 1000000"),
        drawing(" " * svg.MAX_BYTES),
        drawing(head='<?xml-stylesheet href="style.css"?>'),
        drawing("<style>@import 'style.css'; rect { fill: red }</style>"),
    ],
)
def test_svgs_that_refer_to_files_or_expand_are_refused(content):
    with pytest.raises(Unusable, match=f"^{REFUSED}$"):
        read(content)


def test_svgs_with_prefixes_styles_and_links_are_drawn():
    circle = '<circle cx="10" cy="20" r="30" {}/>'
    red = read(drawing(circle.format('fill="red"')))
    by_class = "<style>.a { fill: red }</style>" + circle.format('class="a"')
    linked = '<a href="https://example.org">' + circle.format('style="fill:red"') + "</a>"
    for content in (by_class, linked):
        assert torch.equal(read(drawing(content)), red)
    prefixed = b'<s:svg xmlns:s="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><s:rect width="9" height="9"/></s:svg>'
    assert torch.equal(read(prefixed), -torch.ones(3, 8, 8))


def test_repeated_elements_are_drawn_and_large_numbers_need_no_memory():
    torch.testing.assert_close(read(drawing(uses(2))), read(drawing('<rect width="1" height="1"/>')))
    for head in ('width="1e9" height="1e9"', 'width="1e9in" height="1e9in"', 'width="100%"', 'width="4" height="15"'):
        assert read(drawing().replace(b'viewBox="0 0 20 50"', head.encode())).shape == (3, 8, 8)


def test_a_thousand_hostile_images_do_no_harm():
    """Files with bytes changed, cut, doubled or swapped: each is read, or unusable for a known cause."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))  # small, so that every part of a file is hit
    seeds = [encoded(noise, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")]
    seeds += [encoded(noise.convert("CMYK"), "JPEG"), encoded(noise.convert("P"), "PNG", transparency=3)]
    seeds += [drawing(uses(2)), encoded(noise, icc_profile=SWAPPED)]
    outcomes = collections.Counter()
    for i in range(1000):
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
    assert outcomes["read"] > 20 and outcomes[IMAGE] > 200 and set(outcomes) <= {"read", *CAUSES}


def test_captions_are_cleaned_and_cut():
    assert captions_of(b"\xef\xbb\xbf a  cat\ton a mat \r\n\n a dog\na dog") == ["a cat on a mat", "a dog", "a dog"]
    assert captions_of("a\u2028red\x0bcat\x85sits\x0c\rdown".encode()) == ["a red cat sits", "down"]
    assert captions_of("日".encode() * 10_000_000) == ["日" * pairs.MAX_CAPTION]
    for content in (b"", b" \n", "\u200b\ufeff\u2060".encode()):
        with pytest.raises(Unusable, match=f"^{EMPTY}$"):
            captions_of(content)
    for content in (
        b"\xff\xfe\xff",
        b"caf\xe9",
        "赤い".encode("iso2022_jp"),
        *("red".encode(f"utf-16{x}") for x in ("", "-le")),
    ):
        with pytest.raises(Unusable, match=f"^{ENCODING}$"):
            captions_of(content)
