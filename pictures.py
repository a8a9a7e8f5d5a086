"""Grids of images with their captions, as people look at them."""

import textwrap

import torch
from PIL import Image, ImageDraw, ImageFont

CELL, MARGIN, FONT_SIZE = 128, 6, 12


def to_pil(image):
    """[3, R, R] in [−1, 1] → a PIL image, enlarged to a cell by whole pixels where it fits."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(pixels)
    return picture.resize(
        (CELL, CELL), Image.Resampling.NEAREST if CELL % picture.width == 0 else Image.Resampling.BICUBIC
    )


def labelled_grid(images, captions, columns):
    """Images [n, 3, R, R] in rows of `columns`, each with its caption underneath → a PIL image."""
    font = ImageFont.load_default(FONT_SIZE)
    characters = int(CELL / font.getlength("n"))
    labels = ["\n".join(textwrap.wrap(c, characters, max_lines=4, placeholder=" …")) for c in captions]
    line = FONT_SIZE + 4
    text_height = line * max(label.count("\n") + 1 for label in labels) + MARGIN
    rows = -(-len(images) // columns)
    width, height = CELL + MARGIN, CELL + text_height
    grid = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = MARGIN + i % columns * width, MARGIN + i // columns * height
        grid.paste(to_pil(image), (x, y))
        draw.multiline_text((x, y + CELL + 2), label, fill="black", font=font, spacing=2)
    return grid
