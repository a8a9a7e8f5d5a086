"""Writes the file of a generator again with its weights in float16, for half of the size. Reading it needs nothing new.

python -m weights.half runs/emoji/generator_ema.safetensors --out emoji.safetensors
"""

import argparse
from pathlib import Path

from safetensors.torch import save_file

from common.cli import HelpFormatter, UserError, check_file, told_in_one_line
from common.disk import atomically
from weights.checkpoint import generator_of, read_safetensors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("generator", type=Path, help="a run's folder, or its generator_ema.safetensors")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with told_in_one_line():
        path = generator_of(args.generator)
        if args.out.resolve() == path.resolve():
            raise UserError(f"--out {args.out} is the generator itself, whose full precision would be lost")
        check_file(args.out)
        metadata, state = read_safetensors(path)
        if "generator" not in metadata:
            raise UserError(f"{path} holds no generator of Aurora")
        halves = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
        atomically(args.out, lambda temporary: save_file(halves, temporary, metadata))
        print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, of {path.stat().st_size / 1e6:.1f}")


if __name__ == "__main__":
    main()
