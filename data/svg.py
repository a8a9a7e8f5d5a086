"""Pictures as SVG, rendered with resvg, which runs no scripts and fetches nothing from the web, but would read local
files, expand what refers to itself a million times, and end the process where a drawing is nested too deeply.
"""

import collections
import functools
import io
import re
from xml.parsers import expat

import resvg_py
from PIL import Image

MAX_BYTES = 2**20
MAX_DEPTH = 100  # of elements within elements
MAX_ELEMENTS = 50_000  # with those that are drawn again by reference
MAX_ASPECT = 16  # of the longer side to the shorter one
REFERENCE = re.compile(r"""url\(\s*["']?\s*([^)"']*)""")


class Refused(ValueError):
    """An SVG that is not rendered; the message says why."""


def check(svg):
    """Raises Refused for the bytes of an SVG that refer to anything but its own parts, hold letters, whose fonts are
    not there, or would take long to draw. Raises ExpatError where they are no XML.
    """
    if len(svg) > MAX_BYTES:
        raise Refused("too large")
    inside, sizes, references = [""], collections.Counter(), collections.defaultdict(list)  # by id

    def start(name, attributes):
        if name.rpartition(":")[2] in ("script", "foreignObject", "text") or len(inside) > MAX_DEPTH:
            raise Refused(f"{name} at depth {len(inside)}")
        inside.append(attributes.get("id", inside[-1]))
        sizes[inside[-1]] += 1
        if inside[-1] != inside[-2]:
            references[inside[-2]].append(inside[-1])
        for key, value in attributes.items():
            refer(REFERENCE.findall(value) + [value] * (key.rpartition(":")[2] == "href"))

    def refer(targets):
        for target in targets:
            if not target.strip().startswith("#"):
                raise Refused(f"a reference to {target[:50]}")
            references[inside[-1]].append(target.strip()[1:])

    def refuse_entities(name, *_):
        raise Refused(f"the entity {name}")

    @functools.cache
    def count(name):
        return sizes[name] + sum(map(count, references[name]))

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, lambda _: inside.pop()
    parser.CharacterDataHandler = lambda text: refer(REFERENCE.findall(text))  # of <style>
    parser.EntityDeclHandler = refuse_entities
    try:
        parser.Parse(svg, True)
        if count("") > MAX_ELEMENTS:
            raise Refused(f"{count('')} elements")
    except RecursionError as error:
        raise Refused("references in a circle") from error


def render(svg, resolution):
    """The bytes of an SVG → RGB on white, its shorter side at the resolution. Raises ValueError."""
    check(svg)
    draw = functools.partial(resvg_py.svg_to_bytes, svg.decode("utf-8-sig"), background="white", skip_system_fonts=True)
    image = Image.open(io.BytesIO(draw(width=resolution, height=resolution)), formats=["PNG"])  # the longer side
    if min(image.size) < resolution <= MAX_ASPECT * min(image.size):
        side = -(-2 * resolution**2 // (2 * min(image.size) - 1))  # as the shorter side was rounded
        image = Image.open(io.BytesIO(draw(width=side, height=side)), formats=["PNG"])
    if min(image.size) < resolution:
        raise Refused("too narrow")
    return image.convert("RGB")
