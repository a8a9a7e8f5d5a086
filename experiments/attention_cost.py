"""What self-attention costs as feature points grow: Aurora's by L2 distance, with N² weights, and LadaGAN's, with N.

    python -m experiments.attention_cost --out attention.png

Both with their projections, as wide as in the preset `emoji`, for one picture, in inference. Aurora's never holds its
map as a whole, so that its memory grows with N too; its work does not.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from aurora import ModulatedSelfAttention
from common.cli import HelpFormatter, check_file, told_in_one_line
from common.disk import atomically
from experiments.stopwatch import peak_memory, processor_seconds
from neighbours.ladagan import AdditiveAttention
from presets import PRESETS
from training.plan import FlopCounter

SIDES = (8, 16, 32, 64, 128)
MEASURES = ("GFLOP", "processor time, ms", "peak memory, MB")


def networks():
    """{name: a function of points [1, N, C]}, and C."""
    config = PRESETS["emoji"].generator
    dim = config.num_heads * config.head_dim
    by_distance, w = ModulatedSelfAttention(dim, config.num_heads, config.w_dim), torch.randn(1, config.w_dim)
    return {"L2 distance": lambda x: by_distance(x, w), "additive": AdditiveAttention(dim, config.num_heads)}, dim


@torch.no_grad()
def measure(network, points):
    """→ the numbers of MEASURES."""
    with FlopCounter() as counter:
        network(points)
    peak = peak_memory(lambda: network(points))
    return counter.total / 1e9, 1e3 * processor_seconds(lambda: network(points)), peak / 2**20


def plot(results, path):
    """A panel for each measure, a line for each attention."""
    figure, panels = plt.subplots(1, len(MEASURES), figsize=(3.6 * len(MEASURES), 3.4))
    for number, (panel, measure) in enumerate(zip(panels, MEASURES, strict=True)):
        for name, rows in results.items():
            panel.loglog([side**2 for side in SIDES], [row[number] for row in rows], "o-", label=name)
        panel.set_xticks([side**2 for side in SIDES], [f"{side}²" for side in SIDES])
        panel.minorticks_off()
        panel.set_title(measure, fontsize=10)
        panel.set_xlabel("feature points", fontsize=8)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("attention.png"))
    args = parser.parse_args()
    with told_in_one_line():
        check_file(args.out)
        torch.manual_seed(0)
        attentions, dim = networks()
        results = {name: [] for name in attentions}
        print(f"| points | attention | {' | '.join(MEASURES)} |\n|{' --- |' * (2 + len(MEASURES))}")
        for side in SIDES:
            for name, network in attentions.items():
                results[name].append(row := measure(network, torch.randn(1, side**2, dim)))
                print(f"| {side}² | {name} | {' | '.join(f'{value:.4g}' for value in row)} |", flush=True)
        plot(results, args.out)
        print(f"Drawn in {args.out.resolve()}")


if __name__ == "__main__":
    main()
