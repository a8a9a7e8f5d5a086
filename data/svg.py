"""Renders SVGs with resvg, which runs no scripts and fetches nothing from the web. But it would read local files, draw
an element a million times by nested references, draw huge shapes for ever, and end the process if elements are nested
too deeply; `check` refuses such SVGs.
"""

import collections
import functools
import io
import re
from xml.etree import ElementTree

import resvg_py
from PIL import Image

MAX_BYTES = 2**20
MAX_DEPTH = 100  # of nested elements
MAX_ELEMENTS = 50_000  # including those that references draw again
MAX_ASPECT = 16  # longer side / shorter side
REFUSED = "script", "foreignObject", "text", "pattern"  # a pattern may take terabytes of memory
HUGE = re.compile(r"[\d.]e\+?(?:[7-9]|\d\d)|(?<![.\d])\d{8}", re.IGNORECASE)  # resvg may draw for ever
REFERENCE = re.compile(r"""url\(\s*["']?\s*([^)"']*)""")


class Refused(ValueError):
    """An SVG that is not rendered; the message says why."""


def check(svg):
    """Raises Refused if an SVG, given as bytes, refers to anything except its own parts, contains text, for which no
    font is available, or would take long or much memory to draw. Raises ParseError if it is not XML.
    """
    if len(svg) > MAX_BYTES:
        raise Refused("too large")
    if outside := re.search(rb"<!ENTITY|<\?xml-stylesheet|@import", svg):
        raise Refused(outside[0].decode())
    sizes, references = collections.Counter(), collections.defaultdict(list)  # by id

    def visit(element, inside, depth):
        """inside: the id of the element around this one."""
        name, own = local_name(element.tag), element.get("id", inside)
        if name in REFUSED or depth > MAX_DEPTH:
            raise Refused(f"{name} at depth {depth}")
        if name == "style":
            refer("", REFERENCE.findall("".join(element.itertext())))
        sizes[own] += 1
        if own != inside:
            references[inside].append(own)
        for key, value in element.items():
            refer(own, REFERENCE.findall(value))
            without_colors = re.sub(r"#\w*", "", value)  # one may look like a number: #1e9000
            if key not in ("id", "class") and HUGE.search(without_colors):
                raise Refused(f"a number in {value[:50]}")
            if local_name(key) == "href" and name != "a":  # the target of a click is no part
                refer(own, [value])
        for child in element:
            visit(child, own, depth + 1)

    def refer(owner, targets):
        for target in targets:
            if not target.strip().startswith("#"):
                raise Refused(f"a reference to {target[:50]}")
            references[owner].append(target.strip()[1:])

    @functools.cache
    def count(name):
        return sizes[name] + sum(map(count, references[name]))

    visit(ElementTree.fromstring(svg), "", 1)
    try:
        if count("") > MAX_ELEMENTS:
            raise Refused(f"{count('')} elements")
    except RecursionError as error:
        raise Refused("references in a circle") from error


def local_name(name):
    """A name in XML without its namespace."""
    return name.rpartition("}")[2]


def draw(text, side):
    """An SVG as a text → an RGB image on white whose longer side is given."""
    options = {"background": "white", "skip_system_fonts": True, "dpi": 96}  # with 0, the default, a size in mm is zero
    try:
        png = resvg_py.svg_to_bytes(text, width=side, height=side, **options)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # resvg's, in Rust; it is no Exception, and cannot be imported
            raise
        raise Refused("resvg fails") from error
    return Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGB")


def render(svg, resolution):
    """The bytes of an SVG → an RGB image on white whose shorter side is the resolution. Raises ValueError."""
    text = svg.decode("utf-8-sig")
    check(text.encode())
    image, side = draw(text, resolution), resolution
    while min(image.size) < resolution:
        side = -(-2 * side * resolution // (2 * min(image.size) - 1))  # because resvg rounds the shorter side up
        if side > MAX_ASPECT * resolution:
            raise Refused("too narrow")
        image = draw(text, side)
    if image.getextrema() == ((255, 255),) * 3:
        raise Refused("nothing is drawn")
    return image
