"""Draws pictures from text: `python sample.py "red heart"`.

Also interpolates between two prompts, shows which expert took which point, and enlarges a picture of yours.
"""

import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.cli import Parser, UserError, a_path, a_truncation, errors_in_one_line, natural_number, positive_int
from sampling import files, inference, latent, views
from sampling.pictures import animation, columns_for, expert_map, grid, to_pil
from sampling.pipeline import Pipeline
from weights.generator_file import DEMO


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("prompt", nargs="*", help="one or more texts, each in quotes")
    add("--prompts", type=a_path, help="a UTF-8 text file with a prompt on each line")
    add("--num", type=positive_int, default=4, help="pictures for each prompt")
    add("--seed", type=natural_number, default=0, help="the same seed gives the same pictures")
    add("--truncation", type=a_truncation, default=1.0, help="psi: 1 is all variety, 0 each prompt's mean picture")
    add("--checkpoint", type=a_path, default=DEMO, help="a run, its generator, or the authors' aurora_v1.pth")
    add("--clip", help="MODEL:WEIGHTS of open_clip, to read a large CLIP from a file; default: as in the checkpoint")
    second = (
        "the second stage: a run or its generator (default: NAME_upsampler.safetensors beside the checkpoint, if any)"
    )
    add("--upsampler", type=a_path, help=second)
    add("--resolution", type=positive_int, help="of the pictures (default: the highest; 64: without the second stage)")
    add("--out", type=a_path, default=Path("sample.png"), help="the picture to write; .gif: an animation")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=("auto", *inference.DTYPES), default="auto", help="auto: bf16 for large models, if fast")
    add("--experts", action="store_true", help="next to each picture, which expert took each feature point")
    instead = parser.add_argument_group("instead of a grid of pictures, one of these").add_mutually_exclusive_group()
    each = "a folder for one file per picture; run again to complete it"
    instead.add_argument("--each", type=a_path, metavar="DIR", help=each)
    instead.add_argument("--interpolate", nargs=2, metavar=("FROM", "TO"), help="interpolate between two prompts")
    own = "enlarge a picture that the prompt describes; its centre square is first reduced to 64×64"
    instead.add_argument("--enlarge", type=a_path, metavar="PICTURE", help=own)
    add("--steps", type=positive_int, default=8, help="pictures of --interpolate")
    return parser.parse_args(argv)


def read_prompts(args):
    """The prompts of the command line and of the file. Raises UserError, see latent.check."""
    prompts = [*args.prompt, *(args.interpolate or ())]
    if args.prompts:
        try:
            lines = args.prompts.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise UserError(f"--prompts {args.prompts} is not UTF-8 text; save it as UTF-8") from None
        prompts += filter(None, map(str.strip, lines))
    latent.check(prompts)
    return prompts


def check_numbers(args, prompts):
    """Raises UserError for numbers of prompts or pictures that do not fit the other arguments."""
    if args.interpolate and len(prompts) > 2:
        raise UserError("--interpolate uses its own two prompts; give no others")
    if args.interpolate and args.steps < 2:
        raise UserError("--steps 1: interpolation needs both ends; give 2 or more")
    if args.enlarge and len(prompts) > 1:
        raise UserError(f"--enlarge needs one prompt, which describes the picture; {len(prompts)} were given")
    if args.enlarge and args.truncation != 1:
        raise UserError("--truncation has no effect on --enlarge; leave it out")
    if args.experts and (args.each or args.enlarge):
        raise UserError("--experts is for grids and animations; leave it out with --each and --enlarge")
    pictures = args.steps if args.interpolate else len(prompts) * args.num
    if pictures > files.MOST and not args.each:
        raise UserError(
            f"{pictures} pictures are too many for one file; ask for {files.MOST} at most, or draw with --each"
        )


@torch.no_grad()
def draw(args, pipe, prompts):
    """Writes a grid or an animation of prompts, or of the way between two."""
    if args.interpolate:
        frames = pipe.view(views.interpolation, prompts, args.seed, args.truncation, args.steps)
        columns = args.steps
        heading = [f"Interpolation of the global and local text, seed {args.seed}, psi {args.truncation:g}"]
    else:
        frames = pipe.frames(prompts, args.num, args.seed, args.truncation)
        columns = columns_for(args.num) if args.num > 1 else min(6, len(prompts))
        heading = []
    drawn = pipe.draw(frames)
    panels, experts = [to_pil(image) for image in drawn.images], 0
    if args.experts:
        panels, experts = beside_maps(panels, drawn.routings)
        where = ", ".join(f"{name.split('.')[0]}x{name.split('.')[0]} ({name})" for name in drawn.routings)
        heading.append(f"Next to each picture, the expert of each point, at {where}")
    title = ". ".join(heading)
    if args.out.suffix.lower() == ".gif":
        pictures = animation(panels, drawn.captions, title, experts)
    else:
        pictures = [grid(panels, drawn.captions, columns, title, experts)]
    about = {"prompts": prompts, "seed": args.seed, "psi": args.truncation, "checkpoint": args.checkpoint.name}
    files.save(pictures, args.out, about | {"command": shlex.join(["sample.py", *sys.argv[1:]])})
    print(f"{len(frames)} pictures of {pipe.resolution}×{pipe.resolution} are in {args.out.resolve()}")


def beside_maps(panels, routings):
    """Pictures → each beside the maps of its experts, and the number of experts. Raises UserError if there are none."""
    if not routings:
        raise UserError("--experts: this generator has no experts at this resolution; leave it out")
    cell = panels[0].width
    maps = [[expert_map(index, cell) for index in routing.expert_index] for routing in routings.values()]
    strips = [Image.fromarray(np.hstack(strip)) for strip in zip(panels, *maps, strict=True)]
    return strips, max(routing.logits.shape[-1] for routing in routings.values())


def enlarge(args, pipe, prompts):
    """Writes a user's picture, enlarged by the second stage."""
    if pipe.upsampler is None:
        raise UserError(
            "--enlarge needs an upsampler: name one with --upsampler, and give no --resolution of the first stage"
        )
    small = files.read_picture(args.enlarge, pipe.upsampler.config.input_resolution)
    picture = pipe.enlarge(small, prompts[0], args.seed)
    about = {"prompts": prompts, "enlarged": args.enlarge.name, "seed": args.seed}
    files.save([picture], args.out, about)
    print(f"{args.enlarge}, enlarged to {picture.width}×{picture.height}, is in {args.out.resolve()}")


def main():
    with errors_in_one_line():
        args = parse_args()
        prompts = read_prompts(args)
        check_numbers(args, prompts)
        if not args.each:
            files.check_picture(args.out, args.enlarge)
        stages = args.upsampler, args.resolution
        pipe = Pipeline.load(args.checkpoint, args.device, args.dtype, args.clip, *stages)
        latent.print_notes(pipe.text_encoder, prompts)
        if args.enlarge:
            enlarge(args, pipe, prompts)
        elif args.each:
            new = files.write_each(pipe, prompts, args.num, args.seed, args.truncation, args.each, args.checkpoint.name)
            print(f"{new} new pictures, {len(prompts) * args.num} in all, in {args.each.resolve()}")
        else:
            draw(args, pipe, prompts)


if __name__ == "__main__":
    main()
