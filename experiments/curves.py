"""Draws the curves of a run from its metrics.jsonl, or the first of its sample pictures as they change over time.

python -m experiments.curves runs/emoji --out curves.png
python -m experiments.curves runs/emoji --pictures 1000 2000 4000 8000 --out timeline.png
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image, ImageDraw

from common.cli import HelpFormatter, UserError, check_file, positive_int, told_in_one_line
from common.disk import atomically
from sampling import lettering
from sampling.pictures import CELL, MARGIN

PANELS = {
    "FID by the CLIP in use": ("fid", "reference_fid"),
    "losses": ("d_loss", "g_loss"),
    "the discriminator's last prediction": ("logits_real", "logits_fake", "logits_wrong"),
    "smallest share of an expert, of the mean": ("expert_min_share",),
}
SMOOTHING = 100  # steps of a running mean


def read_log(path):
    """A metrics.jsonl → its rows. Raises UserError."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as the log of a run ({error})") from error
    if not rows:
        raise UserError(f"{path} is empty: the run has made no step yet")
    return rows


def points(rows, name):
    """Where a row has a value → images seen, and the running mean of the values."""
    found = [(row["images"], row[name]) for row in rows if name in row]
    width = SMOOTHING if len(found) == len(rows) else 1
    values = [value for _, value in found]
    means = [statistics.fmean(values[max(0, i - width) : i + 1]) for i in range(len(values))]
    return [images for images, _ in found], means


def plot(rows, path):
    figure, panels = plt.subplots(2, 2, figsize=(11, 6.5))
    pairs = itertools.pairwise(rows)
    grown = [now["images"] for before, now in pairs if now["resolution"] > before["resolution"]]
    for panel, (title, names) in zip(panels.flat, PANELS.items(), strict=True):
        for name in names:
            panel.plot(*points(rows, name), label=name)
        for images in grown:
            panel.axvline(images, color="grey", linewidth=0.5, linestyle="--")
        panel.set_title(title, fontsize=10)
        panel.legend(fontsize=8)
        panel.set_xlabel("images; dashed: the resolution grew", fontsize=8)
    panels[0, 0].set_yscale("log")
    panels[0, 0].yaxis.set_major_formatter("{x:g}")
    panels[0, 0].yaxis.set_minor_formatter("{x:g}")
    figure.tight_layout()
    atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def timeline(folder, steps, path):
    """The first row of the sample grids of several steps, one below the other; below the last, its captions too."""
    rows = []
    for step in steps:
        file = folder / "samples" / f"step_{step:07d}.png"
        if not file.is_file():
            raise UserError(f"there is no {file}; name steps that the run has drawn")
        with Image.open(file) as picture:
            height = (picture.height - 2 * MARGIN) // 3 - MARGIN if step == steps[-1] else CELL  # a grid has three rows
            rows.append(picture.convert("RGB").crop((0, MARGIN, picture.width, MARGIN + height)))
    canvas = Image.new(
        "RGB", (CELL + max(row.width for row in rows), sum(row.height + MARGIN for row in rows)), "white"
    )
    top = 0
    for step, row in zip(steps, rows, strict=True):
        canvas.paste(row, (CELL, top))
        lettering.write(ImageDraw.Draw(canvas), (MARGIN, top + CELL // 2), [f"step {step:,}"])
        top += row.height + MARGIN
    atomically(path, lambda temporary: canvas.save(temporary, "PNG"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--pictures", nargs="+", type=positive_int, metavar="STEP", help="of these steps, no curves")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    with told_in_one_line():
        check_file(args.out)
        if args.pictures:
            timeline(args.run, args.pictures, args.out)
        else:
            plot(read_log(args.run / "metrics.jsonl"), args.out)
    print(f"Drawn in {args.out.resolve()}.")


if __name__ == "__main__":
    main()
