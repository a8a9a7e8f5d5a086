"""Changes a picture by Muse, which can, as it draws by filling in tokens: a hole, a border, or anywhere.

    python -m experiments.edit picture.png "blue heart" --checkpoint runs/muse/generator_ema.safetensors

A row for each seed: the picture; the same through its tokens, which is the best that Muse can do; its middle drawn anew
(inpainting); all but its middle drawn anew (outpainting); and changed toward the text without being told where, by
drawing a few random tokens anew, again and again.
"""

import argparse
from pathlib import Path

import torch

from common.cli import HelpFormatter, positive_int, told_in_one_line
from neighbours.command import load
from neighbours.muse import Muse
from sampling.files import check_picture, read_picture, save
from sampling.pictures import grid, to_pil

COLUMNS = ("the picture", "its tokens", "middle drawn anew", "border drawn anew", "changed anywhere")


def middle(resolution):
    """The half of a square that is in its middle, bool [1, R, R]."""
    inside = (torch.arange(resolution) - (resolution - 1) / 2).abs() < resolution / 4
    return (inside[:, None] & inside)[None]


@torch.no_grad()
def edits(system, image, text, seed):
    """An image [3, R, R] and the clip.Text of one caption → one for each of COLUMNS, [5, 3, R, R]."""
    image, hole = image[None], middle(system.resolution)
    filled = [system.draw(seed, text, system.with_hole(image, region)) for region in (hole, ~hole)]
    return torch.cat([image, system.vqgan.decode(system.vqgan.encode(image)), *filled, system.edit(seed, image, text)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    add = parser.add_argument
    add("picture", type=Path, help="an image file")
    add("prompt", help="what it is to show")
    add("--checkpoint", type=Path, default=Path("runs/muse/generator_ema.safetensors"))
    add("--num", type=positive_int, default=4, help="seeds, a row each")
    add("--out", type=Path, default=Path("edit.png"))
    args = parser.parse_args()
    with told_in_one_line():
        check_picture(args.out)
        system, _ = load(Muse, args.checkpoint)
        image, text = read_picture(args.picture, system.resolution), system.clip.read([args.prompt])
        panels = [to_pil(x) for seed in range(args.num) for x in edits(system, image, text, seed)]
        drawn = grid(panels, COLUMNS * args.num, len(COLUMNS), f"“{args.prompt}”")
        save([drawn], args.out, {name: str(value) for name, value in vars(args).items()})
        print(f"Drawn in {args.out.resolve()}")


if __name__ == "__main__":
    main()
