"""Draws the curves of a run from its metrics.jsonl.

python -m experiments.curves runs/emoji --out curves.png
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt

from common.cli import HelpFormatter, UserError, told_in_one_line
from weights.checkpoint import atomically

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
            panel.axvline(images, color="grey", linewidth=0.5)
        panel.set_title(title, fontsize=10)
        panel.legend(fontsize=8)
        panel.set_xlabel("images", fontsize=8)
    panels[0, 0].set_yscale("log")
    figure.tight_layout()
    atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    with told_in_one_line():
        plot(read_log(args.run / "metrics.jsonl"), args.out)
    print(f"Drawn in {args.out.resolve()}; a vertical line is where the resolution grew.")


if __name__ == "__main__":
    main()
