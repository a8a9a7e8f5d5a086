"""Grids and animations of images with captions, and maps of the expert that took each point."""

import textwrap
import unicodedata

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

from common.cli import UserError

CELL, MARGIN = 128, 6
MOST_COLUMNS = 16
SIZE, LINE, LETTER = 12, 16, 7  # pixels: the height of a letter and of a line, and a width that few letters exceed
FONT = ImageFont.load_default(SIZE)  # Pillow's own, which has Latin letters and shows boxes for other scripts
COLORS = (  # of experts, distinguishable with red-green color blindness too
    "#332288", "#88CCEE", "#117733", "#DDCC77", "#CC6677", "#AA4499", "#44AA99", "#999933",
    "#882255", "#661100", "#6699CC", "#888888", "#000000", "#EE7733", "#0077BB", "#EE3377",
)  # fmt: skip


def in_range(images):
    """Clamps a network's images to [−1, 1]. Raises UserError if one is not finite."""
    if (~images.isfinite()).any():
        advice = "give a smaller psi, or another checkpoint; in training, lower learning rates"
        raise UserError(f"the pictures are not finite numbers: {advice}")
    return images.clamp(-1, 1)


def to_bytes(images):
    """Images [..., 3, R, R], about [−1, 1], → uint8, as in an image file. Raises UserError, see in_range."""
    return ((in_range(images) + 1) * 127.5).round().to(torch.uint8)


def at_own_size(image):
    """[3, R, R], about [−1, 1], → a PIL image."""
    return Image.fromarray(to_bytes(image).permute(1, 2, 0).cpu().numpy())


def to_pil(image):
    """[3, R, R], about [−1, 1], → a PIL image of at least CELL pixels, for a grid."""
    picture = at_own_size(image)
    if picture.width > CELL:
        return picture
    fits = CELL % picture.width == 0
    return picture.resize((CELL, CELL), Image.Resampling.NEAREST if fits else Image.Resampling.BICUBIC)


def expert_map(experts, cell=CELL):
    """The expert of each feature point [N] → a PIL image of their colors."""
    side = round(len(experts) ** 0.5)
    colors = torch.tensor([ImageColor.getrgb(color) for color in COLORS], dtype=torch.uint8)
    pixels = colors[experts.cpu() % len(COLORS)].view(side, side, 3)
    return Image.fromarray(pixels.numpy()).resize((cell, cell), Image.Resampling.NEAREST)


def without_accents(text):
    """ "piñata" → "pinata": the font has no ñ."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def wrapped(text, room, max_lines):
    """A text → at most max_lines lines of about `room` pixels at most. If text is left out, the last ends in …"""
    return textwrap.wrap(without_accents(text), room // LETTER, max_lines=max_lines, placeholder=" …") or [""]


def write(draw, place, lines):
    """Draws lines of text, one below another. place: the upper left corner of the first."""
    for i, line in enumerate(lines):
        draw.text((place[0], place[1] + i * LINE), line, fill="black", font=FONT)


def columns_for(num):
    """The columns of a grid with `num` pictures of each prompt: MOST_COLUMNS at most, in equal rows if possible."""
    rows = -(-num // MOST_COLUMNS)
    return -(-num // rows)


def grid(panels, captions, columns, title="", experts=0):
    """PIL images of one size → one image: rows of them with captions, under a title and a legend of experts' colors."""
    panel_width, panel_height = panels[0].size
    labels = [wrapped(caption, panel_width, 4) for caption in captions]
    width, height = panel_width + MARGIN, panel_height + max(map(len, labels)) * LINE + MARGIN
    heading = wrapped(title, columns * width, 9) if title else []
    legend = MARGIN + len(heading) * LINE
    top = legend + (LINE if experts else 0) + (MARGIN if title or experts else 0)
    rows = -(-len(panels) // columns)
    canvas = Image.new("RGB", (columns * width + MARGIN, top + rows * height + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    write(draw, (MARGIN, MARGIN), heading)
    for i, (panel, label) in enumerate(zip(panels, labels, strict=True)):
        x, y = MARGIN + i % columns * width, top + i // columns * height
        canvas.paste(panel, (x, y))
        write(draw, (x, y + panel_height + 2), label)
    for expert in range(experts):
        x, side = MARGIN + expert * 28, SIZE
        draw.rectangle((x, legend + 1, x + side, legend + 1 + side), fill=COLORS[expert % len(COLORS)])
        write(draw, (x + side + 3, legend), [str(expert)])
    return canvas


def animation(panels, captions, title="", experts=0):
    """PIL images → a grid of one cell for each, all of one size."""
    frames = [grid([panel], [caption], 1, title, experts) for panel, caption in zip(panels, captions, strict=True)]
    height = max(frame.height for frame in frames)
    return [ImageOps.pad(frame, (frame.width, height), color="white", centering=(0, 0)) for frame in frames]
