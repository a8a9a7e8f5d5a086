"""Renders SVGs with resvg, which runs no scripts and fetches nothing from the web. But it would read local files, draw
an element a million times by nested references, and end the process if elements are nested too deeply; `check` refuses
such SVGs.
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
REFERENCE = re.compile(r"""url\(\s*["']?\s*([^)"']*)""")
# A color in a wide gamut, after the same color in sRGB: so Figma writes them.
WIDE_COLOR = re.compile(r"\b((fill|stroke|stop-color):[^;\"']*;\s*)\2:\s*color\(display-p3[^)]*\);?")
# The CSS that resvg reads: rules with simple selectors, and the properties of SVG 1.1. Some others change no picture.
# What is left is refused, because resvg ignores it or draws black: @media, pseudo-classes, transforms, variables, …
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
RULE = re.compile(r"[\w\s.#*>,-]*\{([^{}]*)\}")
PROPERTY = re.compile(
    r"(?:fill|stroke|stop|flood|marker|font|text|shape|color|line|letter|word|writing|glyph|solid|-inkscape)(?:-[\w-]+)?"
    r"|alignment-baseline|background-color|baseline-shift|clip|clip-path|clip-rule|cursor|direction|display"
    r"|dominant-baseline|enable-background|filter|height|image-rendering|isolation|kerning|lighting-color|margin|mask"
    r"|mask-type|mix-blend-mode|opacity|overflow|padding|paint-order|pointer-events|unicode-bidi|user-select"
    r"|vector-effect|vertical-align|visibility|white-space|width"
)
UNREAD_VALUE = re.compile(
    r"(?<![\w-])(?!(?:url|rgba?|hsla?|blur|brightness|contrast|drop-shadow|grayscale|invert|saturate|sepia)\()[\w-]+\("
    r"|(?:rgb|hsl)a?\([^,)]*\)|hsla?\([^,)]*[a-z]"  # without commas, or with a unit
    r"|\b(?i:none|currentcolor)\b(?<!none)(?<!currentColor)"  # resvg knows only this case
    r"|non-scaling-stroke|plus-lighter|plus-darker|\b(?:unset|revert)\b"
)
UNREAD_KEYS = ("pathLength", "transform-box")


class Refused(ValueError):
    """An SVG that is not rendered; the message says why."""


def check(svg):
    """Raises Refused if an SVG, given as bytes, refers to anything except its own parts, contains text, for which no
    font is available, or would take long to draw. Raises ParseError if it is not XML.
    """
    if len(svg) > MAX_BYTES:
        raise Refused("too large")
    if outside := re.search(rb"<!ENTITY|<\?xml-stylesheet", svg):
        raise Refused(outside[0].decode())
    sizes, references = collections.Counter(), collections.defaultdict(list)  # by id
    stylesheet = []

    def visit(element, inside, depth):
        """inside: the id of the element around this one."""
        name, own = local_name(element.tag), element.get("id", inside)
        if name in ("script", "foreignObject", "text") or depth > MAX_DEPTH:
            raise Refused(f"{name} at depth {depth}")
        if name == "style":
            if element.get("media", "all") not in ("all", "screen"):
                raise Refused(f"a style for {element.get('media')}")
            stylesheet.extend(element.itertext())
        sizes[own] += 1
        if own != inside:
            references[inside].append(own)
        for key, value in element.items():
            refer(own, REFERENCE.findall(value))
            if key == "style":
                check_declarations(COMMENT.sub("", value))
            elif key in UNREAD_KEYS or (PROPERTY.fullmatch(key) and UNREAD_VALUE.search(value)):
                raise Refused(f"{key}={value}")
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
    css = COMMENT.sub("", "".join(stylesheet))
    refer("", REFERENCE.findall(css))
    check_stylesheet(css)
    try:
        if count("") > MAX_ELEMENTS:
            raise Refused(f"{count('')} elements")
    except RecursionError as error:
        raise Refused("references in a circle") from error


def local_name(name):
    """A name in XML without its namespace."""
    return name.rpartition("}")[2]


def check_stylesheet(css):
    """Raises Refused if the content of <style>, without comments, is more than resvg reads."""
    if rest := RULE.sub("", css).strip():
        raise Refused(rest)
    for declarations in RULE.findall(css):
        check_declarations(declarations)


def check_declarations(text):
    """The same for what is inside of a rule's braces or in a `style` attribute."""
    for declaration in text.split(";"):
        name, _, value = map(str.strip, declaration.partition(":"))
        is_read = PROPERTY.fullmatch(name) and not UNREAD_VALUE.search(value)
        if name and not is_read and value not in ("none", "transparent"):
            raise Refused(declaration)


def render(svg, resolution):
    """The bytes of an SVG → an RGB image on white whose shorter side is the resolution. Raises ValueError."""
    try:
        text = svg.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused("not UTF-8") from error
    text = WIDE_COLOR.sub(r"\1", text)
    check(text.encode())
    options = {"background": "white", "skip_system_fonts": True, "dpi": 96}  # with 0, the default, a size in mm is zero
    draw = functools.partial(resvg_py.svg_to_bytes, text, **options)
    image = Image.open(io.BytesIO(draw(width=resolution, height=resolution)), formats=["PNG"])  # of the longer side
    side = resolution
    while min(image.size) < resolution and side < MAX_ASPECT * resolution:
        larger = -(-2 * side * resolution // (2 * min(image.size) - 1))  # because resvg rounds the shorter side up
        side = min(larger, MAX_ASPECT * resolution)
        image = Image.open(io.BytesIO(draw(width=side, height=side)), formats=["PNG"])
    if min(image.size) < resolution:
        raise Refused("too narrow")
    image = image.convert("RGB")
    if image.getextrema() == ((255, 255),) * 3:
        raise Refused("nothing is drawn")
    return image
