"""Captions in any script: each stretch of a text is drawn by the first font that has its characters."""

import functools
import importlib.util
import re
from pathlib import Path

from PIL import ImageFont

SIZE = 11  # pixels
LINE = SIZE + 5
REGULAR = 400  # the weight of a variable font
INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufe00-\ufe0f\U000e0020-\U000e007f]")  # they join or vary what they follow
IDEOGRAPHS = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef"  # a line may end after any of them
PIECES = re.compile(rf"\s+|[{IDEOGRAPHS}]|[^\s{IDEOGRAPHS}]+")


@functools.cache
def paths():
    """The fonts, in the order they are asked: DejaVu has ψ and ×, which Pillow's own lacks; Noto has the rest."""
    found = []
    for package, folder in (("matplotlib", "mpl-data/fonts/ttf"), ("manimgx_fonts", ""), ("manimgx_fonts_cjk", "")):
        if spec := importlib.util.find_spec(package):
            place = Path(spec.submodule_search_locations[0], folder)
            found += [place / "DejaVuSans.ttf"] if folder else sorted(place.glob("*.tt[cf]"))
    return found


@functools.cache
def characters(path):
    """The code points that a font has."""
    from matplotlib.ft2font import FT2Font  # not at the top: it takes a while, and most captions are in ASCII

    return frozenset(FT2Font(path).get_charmap())


@functools.cache
def font(path):
    font = ImageFont.truetype(path, SIZE)
    if "[wght]" in path.name or "-VF." in path.name:
        font.set_variation_by_axes([REGULAR])
    return font


def font_path(character):
    """The first font that has a character, or None."""
    return next((path for path in paths() if ord(character) in characters(path)), None)


def missing(text):
    """The characters of a text that no font has, each once."""
    return [c for c in dict.fromkeys(INVISIBLE.sub("", text)) if not (c.isascii() or c.isspace() or font_path(c))]


def runs(text):
    """A text → [(font, stretch)], in order. A stretch keeps its font while that has the characters."""
    first = last = paths()[0]
    if text.isascii():
        return [(font(first), text)]
    stretches = []
    for character in text:
        goes_on = INVISIBLE.match(character) or ord(character) in characters(last)
        if character.isascii() and not character.isspace():
            path = first
        else:
            path = last if goes_on else font_path(character) or first
        if stretches and path == last:
            stretches[-1][1] += character
        else:
            stretches.append([path, character])
        last = path
    return [(font(path), stretch) for path, stretch in stretches]


def width(text):
    """In pixels."""
    return sum(font.getlength(stretch) for font, stretch in runs(text))


def wrapped(text, room, max_lines):
    """A text → at most max_lines lines, none wider than `room` pixels. Where there is more, the last ends in an …"""
    lines = [""]
    for piece in PIECES.findall(" ".join(text.split())):
        for part in [piece] if width(piece) <= room else piece:
            if lines[-1] and width(lines[-1] + part) > room:
                lines.append("")
            lines[-1] = (lines[-1] + part).lstrip()
        if len(lines) > max_lines:
            break
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and width(f"{last} …") > room:
            last = last[:-1].rstrip()
        lines[max_lines - 1 :] = [f"{last} …"]
    return lines


def write(draw, place, lines):
    """Draws lines of text with an ImageDraw, one below another; place: of the first, its left upper corner."""
    ascent, _ = font(paths()[0]).getmetrics()
    for i, line in enumerate(lines):
        x, baseline = place[0], place[1] + ascent + i * LINE
        for face, stretch in runs(line):
            draw.text((x, baseline), stretch, fill="black", font=face, anchor="ls")
            x += face.getlength(stretch)
