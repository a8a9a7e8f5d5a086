"""Images and captions as the web has them: each is read correctly, or unusable for one of CAUSES."""

import collections
import contextlib
import gzip
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from clip import load_clip
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


def bmp_with_alpha(pixel):
    """A BMP of one color, four bytes: blue, green, red and alpha."""
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 20, 50, 1, 32, 3, 4000, 0, 0, 0, 0) + masks + bytes(52)
    return struct.pack("<2sIII", b"BM", 4122, 0, 122) + header + pixel * 1000


KINDS = {
    "L": encoded(Image.new("L", (20, 50), 200)),
    "16 bits in a TIFF": encoded(Image.fromarray(np.full((20, 50), 200 * 257, np.uint16)), "TIFF"),
    "16 bits": encoded(Image.fromarray(np.full((20, 50), 200 * 257, np.uint16))),
    "RGBA": encoded(Image.new("RGBA", (20, 50), (200, 200, 200, 255))),
    "CMYK": jpeg((55, 55, 55, 0), mode="CMYK"),
    "animation": encoded(Image.new("L", (20, 50), 200), "GIF", save_all=True, append_images=[Image.new("L", (20, 50))]),
    "WebP": encoded(Image.new("RGB", (20, 50), (200,) * 3), "WEBP", lossless=True),
    "12 megapixels": encoded(Image.new("L", (4000, 3000), 200), "JPEG"),
    "BMP whose alpha is unused": bmp_with_alpha(b"\xc8\xc8\xc8\0"),
    "BMP": bmp_with_alpha(b"\xc8\xc8\xc8\xff"),
    "SVG": drawing('<g id="a"/><use href="#a"/>', head='<?xml version="1.0"?><!DOCTYPE svg>\n'),
    "wide SVG": drawing(box="0 0 100 20"),
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


def chunk(kind, data, damage=0):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ damage)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8))
MEGABYTES = zlib.compress(bytes(3 * 2**20))


def test_errors_outside_the_pixels_of_a_png_are_repaired():
    """It stays turned, colored and transparent as it says, unless the chunk that says so is the damaged one."""
    content, damaged = encoded(NOISE), chunk(b"tEXt", b"a\0b", damage=1)
    plain = read(content, 80)

    def with_chunks(*chunks):
        return read(content[:33] + b"".join(chunks) + content[33:], 80)

    too_large = [chunk(kind, b"a\0\0" + MEGABYTES) for kind in (b"zTXt", b"iCCP")]
    for changes_nothing in (damaged, chunk(b"pHYs", b"ab"), *too_large):
        assert torch.equal(with_chunks(changes_nothing), plain)
    turned = b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"
    for shown, changes in ((b"eXIf", turned), (b"gAMA", struct.pack(">I", 100_000))):
        changed = with_chunks(chunk(shown, changes))
        assert not torch.equal(changed, plain)
        assert torch.equal(with_chunks(chunk(shown, changes), damaged), changed)
        assert torch.equal(with_chunks(chunk(shown, changes, damage=1)), plain)
    clear = encoded(Image.new("P", (20, 20), 0), transparency=0)
    with pytest.raises(Unusable, match=f"^{pairs.CLEAR}$"):  # as without the damage
        read(clear[:33] + damaged + clear[33:])


def test_a_large_jpeg_decoded_at_a_fraction_of_its_size_keeps_its_detail():
    content = encoded(NOISE.resize((400, 400), Image.Resampling.BICUBIC), "JPEG", quality=95)
    whole = NOISE.resize((400, 400), Image.Resampling.BICUBIC).resize((80, 80), Image.Resampling.LANCZOS)
    assert (read(content, 80) - pairs.to_tensor(whole)).abs().mean() < 0.05


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_last_two_bytes_is_whole_and_without_more_is_not(progressive):
    content = encoded(NOISE, "JPEG", quality=95, progressive=progressive)
    assert torch.equal(read(content[:-2], 80), read(content, 80))
    for cut in (8, 60, len(content) // 2):
        with pytest.raises(Unusable, match=f"^{IMAGE}$"):
            read(content[:-cut], 80)


def test_a_picture_is_cut_to_its_centre_and_upright():
    """Also if the EXIF tags beside the orientation are of wrong types."""
    image = Image.new("RGB", (30, 10), "white")
    image.paste("red", (10, 0, 20, 5))
    tags = [(0x0112, 3, 1, b"\3\0\0\0"), (0x011A, 7, 2, b"ab\0\0"), (0x8769, 2, 4, b"abc\0")]
    wrong = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    wrong += b"".join(struct.pack("<HHI4s", *tag) for tag in tags) + bytes(4)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    upright = read(encoded(image), 10)
    assert (upright[1, :5] == -1).all() and (upright[1, 5:] == 1).all()
    for kind, turned in (("PNG", exif), ("WEBP", exif), ("TIFF", exif), ("PNG", b"Exif\0\0" + wrong)):
        content = encoded(image, kind, exif=turned, lossless=True)
        torch.testing.assert_close(read(content, 10), upright.flip(1, 2), atol=0.02, rtol=0)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"?XYZ", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"?XYZ", b"bXYZ", 1)  # blue is red


def gray_profile(gamma):
    """The bytes of an ICC profile of gray pictures: a header, then a table of two tags and their values."""
    white = struct.pack(">4sIiii", b"XYZ ", 0, 63190, 65536, 54061)
    curve = struct.pack(">4sIIHxx", b"curv", 0, 1, gamma * 256)
    table = struct.pack(">I4sII4sII", 2, b"wtpt", 156, len(white), b"kTRC", 176, len(curve))
    length = 128 + len(table) + len(white) + len(curve)
    header = struct.pack(
        ">I4sI4s4s4s12x4s28xiii48x", length, b"", 0x2400000, b"mntr", b"GRAY", b"XYZ ", b"acsp", 63190, 65536, 54061
    )
    return header + table + white + curve


def test_colors_are_read_as_their_profile_says():
    """An invalid profile, or one of other channels, is ignored."""
    image, grey = Image.new("RGB", (20, 20), (120, 200, 80)), Image.new("L", (20, 20), 90)
    for kind in ("PNG", "WEBP"):
        pixel = (read(encoded(image, kind, lossless=True, icc_profile=SWAPPED))[:, 0, 0] + 1) * 127.5
        torch.testing.assert_close(pixel, torch.tensor([80.0, 200, 120]), atol=2, rtol=0)
    for kind in ("PNG", "JPEG"):
        assert torch.equal(read(encoded(image, kind, icc_profile=b"none")), read(encoded(image, kind)))
    assert torch.equal(read(encoded(grey, icc_profile=SWAPPED)), read(encoded(grey)))
    for form in ("L", "LA", "P"):  # 90 is a luminance of (90/255)², which is 99 in sRGB
        pixel = (read(encoded(grey.convert(form), icc_profile=gray_profile(gamma=2)))[:, 0, 0] + 1) * 127.5
        torch.testing.assert_close(pixel, torch.full((3,), 99.0), atol=1, rtol=0)
    assert torch.equal(read(encoded(image, icc_profile=gray_profile(gamma=2))), read(encoded(image)))


def test_the_gamma_of_a_png_is_read():
    content = encoded(Image.new("RGB", (20, 20), (184, 2, 2)))
    linear, srgb = chunk(b"gAMA", struct.pack(">I", 100_000)), chunk(b"sRGB", b"\0")
    for chunks, color in ((linear, (220.0, 28, 28)), (linear + srgb, (184.0, 2, 2))):
        pixel = (read(content[:33] + chunks + content[33:])[:, 0, 0] + 1) * 127.5
        torch.testing.assert_close(pixel, torch.tensor(color), atol=1, rtol=0)


@pytest.mark.parametrize(("curve", "cause"), [(13, None), (1, None), (8, FORMAT), (16, FORMAT), (18, FORMAT)])
@pytest.mark.parametrize("kind", ["PNG", "AVIF"])
def test_a_picture_with_the_curve_of_hdr_is_refused(curve, cause, kind):
    plain = encoded(Image.new("RGB", (20, 20), (184, 2, 2)), kind)
    if kind == "PNG":
        content = plain[:33] + chunk(b"cICP", bytes([9, curve, 0, 1])) + plain[33:]
    else:
        at = plain.index(b"colrnclx") + 10
        content = plain[:at] + struct.pack(">H", curve) + plain[at + 2 :]
    if cause is None:
        assert torch.equal(read(content), read(plain))
    else:
        with pytest.raises(Unusable, match=f"^{cause}$"):
            read(content)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_transparent_color_of_a_png_of_few_bits_is_read(bits):
    """The color 1 becomes white, 0 stays black."""
    content = with_clear_color(bits)
    assert (read(content) == -1).all()
    pixels = zlib.compress((b"\0" + bytes([2 ** (8 - bits)]) + bytes(16 * bits // 8 - 1)) * 16)  # the first one is 1
    start = content.index(b"IDAT") - 4
    image = read(content[:start] + chunk(b"IDAT", pixels) + content[-12:], 16)
    assert (image[:, :, 0] == 1).all() and (image[:, :, 1:] == -1).all()


def bomb(side):
    """A PNG whose header promises side × side pixels and whose data never comes."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return pairs.PNG + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


def with_clear_color(bits, kind=0):
    """A black PNG with a transparent color. kind: 0 for gray, 2 for RGB."""
    side, values = 16, 3 if kind else 1
    header = struct.pack(">IIBBBBB", side, side, bits, kind, 0, 0, 0)
    rows = (b"\0" + bytes(side * values * bits // 8)) * side
    color = chunk(b"tRNS", struct.pack(f">{values}H", *[1] * values))
    return pairs.PNG + chunk(b"IHDR", header) + color + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_of_16_bits(white_is):
    """A gray TIFF. white_is: 0 if the smallest value is white, 1 if the largest is."""
    content = encoded(Image.fromarray(np.full((20, 20), 200 * 257, np.uint16)), "TIFF")
    tag, usual = struct.Struct("<HHIHxx"), (pairs.WHITE_IS, 3, 1, 1)
    assert content.count(tag.pack(*usual)) == 1
    return content.replace(tag.pack(*usual), tag.pack(*usual[:3], white_is))


def cut_tiff():
    """The first half of a TIFF, whose tags are at its front."""
    noise = np.random.default_rng(0).integers(255, size=(20, 20, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), "TIFF")
    return content[: len(content) // 2]


def planar_tiff():
    """An RGB TIFF of 16 bits whose colors lie apart, as Photoshop writes "per channel"."""
    size, end = 20 * 20 * 2, 8 + 2 + 10 * 12 + 4
    starts = [end + 30 + i * size for i in range(3)]
    entries = [(256, 3, 1, 20), (257, 3, 1, 20), (258, 3, 3, end), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 3, end + 6)]
    entries += [(277, 3, 1, 3), (278, 3, 1, 20), (279, 4, 3, end + 18), (284, 3, 1, 2)]
    head = b"II*\0" + struct.pack("<IH", 8, 10) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return head + struct.pack("<3H3I3I", 16, 16, 16, *starts, size, size, size) + bytes(3 * size)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", FORMAT),
        (b"<html>", FORMAT),
        (jpeg((1, 2, 3), size=(7, 100)), SMALL),
        (encoded(Image.new("1", (1, 1))), SMALL),
        (bomb(100_000), LARGE),
        (bomb(2**31 - 1), LARGE),
        (bomb(100), IMAGE),
        (encoded(Image.fromarray(np.full((20, 20), 70_000, np.int32)), "TIFF"), FORMAT),
        (encoded(Image.fromarray(np.full((20, 20), 0.5, np.float32)), "TIFF"), FORMAT),
        *((with_clear_color(*form), FORMAT) for form in ((16,), (16, 2))),
        (b"II*\0" + bytes(99), FORMAT),
        (tiff_of_16_bits(white_is=0), FORMAT),
        (planar_tiff(), FORMAT),
        (cut_tiff(), IMAGE),
        (b"\0\0\0\x18ftypheic" + bytes(99), FORMAT),
        (encoded(Image.new("RGB", (20, 20)), "EPS"), FORMAT),  # Pillow would start Ghostscript on it
        *((encoded(Image.new("RGB", (20, 20)), kind), FORMAT) for kind in ("PPM", "ICO", "JPEG2000")),
        (gzip.compress(drawing()), FORMAT),
        *((clear(mode, False), pairs.CLEAR) for mode in CLEAR),
        (
            encoded(
                Image.merge("RGBA", [Image.new("L", (20, 20), 255)] * 3 + [Image.linear_gradient("L").resize((20, 20))])
            ),
            pairs.CLEAR,
        ),
        (b"<svg", IMAGE),
        (b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><g/></svg>', REFUSED),
        *((drawing("<g id='é'/>").decode().encode(code), REFUSED) for code in ("latin-1", "utf-16")),
        (drawing("<style media='print'>rect { fill: black }</style><rect width='9' height='9' fill='red'/>"), REFUSED),
        (drawing("<g id='é'/>", head='<?xml version="1.0" encoding="latin-1"?>').decode().encode("latin-1"), REFUSED),
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
        drawing("&a;", head='<!DOCTYPE svg [<!ENTITY a "b">]>'),
        drawing("&a;", head='<!DOCTYPE svg [<!ENTITY a SYSTEM "/etc/passwd">]>'),
        drawing(uses(7)),
        drawing('<g id="a"><use href="#a"/></g>'),
        drawing("<g>" * 1000 + "</g>" * 1000),
        drawing("<g>" * 100_000 + "</g>" * 100_000),
        drawing(box="0 0 1 1000000"),
        drawing(box="0 0 1000000 1"),
        drawing(" " * svg.MAX_BYTES),
        drawing(head='<?xml-stylesheet href="style.css"?>'),
        drawing("<style>@import 'style.css'; rect { fill: red }</style>"),
        drawing("<style>@media screen { rect { fill: red } }</style>"),
        *(drawing(f"<style>rect{x} {{ fill: red }}</style>") for x in (":nth-of-type(1)", ":last-child", ":root")),
        drawing("<style>rect { fill: red; g { fill: blue } }</style>"),
        *(drawing(f'<rect style="{x}"/>') for x in ("transform:rotate(9deg)", "background:red", "rotate:9deg")),
        *(drawing(f'<rect {x}="var(--a,.5)"/>') for x in ("opacity", "stroke-width")),
        *(drawing(f'<rect style="{x}"/>') for x in ("FILL:red", "clip-path:circle(9px)", "opacity:var(--a)")),
        *(drawing(f'<rect style="fill:{x}"/>') for x in ("var(--a,red)", "oklch(.6 .2 20)", "rgb(255 0 0 / 50%)")),
        *(
            drawing(f'<rect fill="{x}"/>')
            for x in ("hsl(0deg 100% 50%)", "hsl(240deg,100%,50%)", "currentcolor", "NONE")
        ),
        *(drawing(f'<rect style="{x}"/>') for x in ("fill:unset", "mix-blend-mode:plus-lighter")),
        *(drawing(f"<rect {x}/>") for x in ('pathLength="1"', 'transform-box="fill-box"')),
        drawing('<rect style="stroke:red;fill:color(display-p3 1 0 0)"/>'),  # without a color in sRGB before it
    ],
)
def test_svgs_that_refer_to_files_or_expand_are_refused(content):
    with pytest.raises(Unusable, match=f"^{REFUSED}$"):
        read(content)


def test_svgs_of_figma_with_prefixes_and_with_links_are_drawn():
    circle = '<circle cx="10" cy="20" r="30" {}/>'
    red = read(drawing(circle.format('fill="red"')))
    wide = 'style="fill:red;fill:color(display-p3 1.0000 0.0000 0.0000);fill-opacity:1;"'
    linked = f'<a href="https://example.org">{circle.format(wide)}</a>'
    by_class = "<style>/* a { */ .a, g>#b { fill : red; transform:none }</style>" + circle.format('class="a"')
    by_name = f'<g color="red">{circle.format("""fill="currentColor" stroke="none" """)}</g>'
    in_hsl = circle.format('fill="hsl(0, 100%, 50%)"')
    for content in (circle.format(wide), linked, by_class, by_name, in_hsl, circle.format('fill="rgba(255, 0, 0, 1)"')):
        assert torch.equal(read(drawing(content)), red)
    prefixed = b'<s:svg xmlns:s="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><s:rect width="9" height="9"/></s:svg>'
    assert torch.equal(read(prefixed), -torch.ones(3, 8, 8))


def test_the_emoji_refer_to_nothing_and_large_numbers_need_no_memory():
    torch.testing.assert_close(read(drawing(uses(2))), read(drawing('<rect width="1" height="1"/>')))
    for head in ('width="1e9" height="1e9"', 'width="1e9in" height="1e9in"', 'width="100%"', 'width="4" height="15"'):
        assert read(drawing().replace(b'viewBox="0 0 20 50"', head.encode())).shape == (3, 8, 8)


UNITS = {"mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96, "pt": 96 / 72, "pc": 16, "em": 16}  # in pixels


@pytest.mark.parametrize("unit", UNITS)
def test_an_svg_with_a_size_in_any_unit_is_the_same_drawing_as_in_pixels(unit):
    content, size = drawing('<circle cx="9" cy="20" r="8" fill="red"/>'), UNITS[unit]
    sized = content.replace(b"<svg", f'<svg width="8{unit}" height="20{unit}"'.encode())
    pixels = content.replace(b"<svg", f'<svg width="{8 * size}" height="{20 * size}"'.encode())
    assert torch.equal(read(sized, 32), read(pixels, 32)) and len(read(sized, 32).unique()) > 9


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
    marked, unmarked = "red heart".encode("utf-16"), ["red heart".encode(f"utf-16-{end}") for end in ("le", "be")]
    for content in (b"\xff\xfe\xff", b"caf\xe9", b"cut \xe6\x97", "赤い".encode("iso2022_jp"), marked):
        with pytest.raises(Unusable, match=f"^{ENCODING}$"):
            captions_of(content)
    for content in (b"a cat\0", *unmarked):
        with pytest.raises(Unusable, match=r"^captions .* NUL"):
            captions_of(content)


PIECES = ["<start_of_text>", "<end_of_text>", "&lt;", "🦖", "\u202e", "a\u0301" * 50, "٣", "日本", "x" * 5000, "'\"\\"]


def test_hostile_captions_do_no_harm():
    """Any bytes become captions that CLIP reads, or are unusable."""
    rng, clip, taken = np.random.default_rng(0), load_clip("emoji"), []
    for i in range(100):
        text = "".join(rng.choice(PIECES, rng.integers(2, 30))).encode()
        with contextlib.suppress(Unusable):
            taken += captions_of(text if i % 2 else rng.bytes(int(rng.integers(1, 60))))
    assert len(taken) >= 50
    assert clip.read(taken).embedding.isfinite().all()


def test_a_picture_that_may_be_cut_at_the_limit_is_too_large(monkeypatch):
    content = jpeg((1, 2, 3))
    sample = pairs.Sample("0", {".jpg": content, ".txt": b"x"})
    assert pairs.read_pair(sample, 8)[1] == ["x"]
    monkeypatch.setattr(pairs, "MAX_FILE", len(content))
    with pytest.raises(Unusable, match=f"^{LARGE}$"):
        pairs.read_pair(sample, 8)
