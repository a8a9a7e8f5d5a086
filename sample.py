"""Draws pictures from text: `python sample.py "red heart"`.

Also shows the latent space: several seeds or truncations, interpolation between two prompts, layers that use different
prompts, a walk as GIF, and which expert took which point.
"""

import common.interrupts  # noqa: F401

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from common.cli import (
    Parser,
    UserError,
    a_path,
    a_truncation,
    errors_in_one_line,
    natural_number,
    positive_int,
)
from sampling import files, inference, latent, views
from sampling.pictures import animation, expert_map, grid, to_pil
from sampling.pipeline import Pipeline
from weights.generator_file import DEMO

COLUMNS = 16  # at most, without a view

# The options that each view uses, of those that not all use.
VIEWS = {
    "each": {"num", "seed", "truncation"},
    "seeds": {"truncation", "experts", "out"},
    "truncation_sweep": {"seed", "experts", "out"},
    "interpolate": {"seed", "truncation", "steps", "part", "experts", "out"},
    "mix": {"seed", "truncation", "experts", "out"},
    "latent_walk": {"seed", "truncation", "steps", "experts", "out"},
    "like": {"experts", "out"},
    "enlarge": {"seed", "out"},
    "show": set(),
    "": {"num", "seed", "truncation", "experts", "out"},
}


def parse_args(argv=None):
    """Raises UserError for an option that the view does not use."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("prompt", nargs="*", help="one or more texts, each in quotes")
    add("--prompts", type=a_path, help="a UTF-8 text file with a prompt on each line")
    add("--num", type=positive_int, default=4, help="pictures for each prompt")
    add("--seed", type=natural_number, default=0, help="the same seed gives the same pictures")
    add("--truncation", type=a_truncation, default=1.0, help="psi: 1 is all variety, 0 each prompt's mean picture")
    add("--checkpoint", type=a_path, default=DEMO, help="a run, its generator, or the authors' aurora_v1.pth")
    add("--clip", help="MODEL:WEIGHTS of open_clip, to read a large CLIP from a file; default: as in the checkpoint")
    add(
        "--upsampler",
        type=a_path,
        help="the second stage: a run or its generator_ema.safetensors (default: NAME_upsampler.safetensors in the "
        "checkpoint's folder, if it exists)",
    )
    add("--resolution", type=positive_int, help="of the pictures (default: the highest; 64: without the second stage)")
    add("--out", type=a_path, default=Path("sample.png"), help="the picture to write; .gif: an animation")
    add("--show", type=a_path, metavar="FILE.png", help="only print how a picture of this command was made")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=("auto", *inference.DTYPES), default="auto", help="auto: bf16 for large models, if fast")
    add("--experts", action="store_true", help="next to each picture, which expert took each feature point")
    look = parser.add_argument_group("views, one at a time").add_mutually_exclusive_group()
    each = "a folder for one file per picture; run again to complete it"
    look.add_argument("--each", type=a_path, metavar="DIR", help=each)
    look.add_argument("--seeds", nargs="+", action="extend", type=natural_number, help="a column for each seed")
    look.add_argument("--truncation-sweep", action="store_true", help="a column for each of several truncations")
    look.add_argument("--interpolate", nargs=2, metavar=("FROM", "TO"), help="interpolate between two prompts")
    look.add_argument("--mix", nargs=2, metavar=("COARSE", "FINE"), help="low layers use one prompt, others another")
    look.add_argument("--latent-walk", action="store_true", help="one prompt, from seed to seed; best as .gif")
    edit = "fit w to a square picture that the first prompt describes; further prompts edit it"
    look.add_argument("--like", type=a_path, metavar="PICTURE", help=edit)
    look.add_argument("--enlarge", type=a_path, metavar="PICTURE", help="enlarge a square picture of the prompt")
    add("--steps", type=positive_int, default=8, help="frames of --interpolate and --latent-walk")
    add("--part", choices=("both", "global", "local"), default="both", help="which text --interpolate changes")
    options = sorted(set.union(*VIEWS.values()))
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(options)))  # None: it was not given
    view = next((name for name in VIEWS if name and getattr(args, name)), "")
    for name in options:
        if getattr(args, name) is None:
            setattr(args, name, parser.get_default(name))
        elif name not in VIEWS[view]:
            where = f"with --{view.replace('_', '-')}" if view else "without a view"
            raise UserError(f"{where} --{name} is not used; leave it out")
    return args


def read_prompts(args):
    """The prompts of the command line and of the file. Raises UserError, see latent.check."""
    prompts = [*args.prompt, *(args.interpolate or args.mix or ())]
    if args.prompts:
        try:
            lines = args.prompts.read_text(encoding="utf-8-sig").split("\n")
            prompts += filter(None, map(str.strip, lines))
        except UnicodeDecodeError:
            prompts = ["\0"]
        if any("\0" in prompt or "\x1b" in prompt for prompt in prompts):
            why = "is not UTF-8 text, or contains a NUL or escape character; save it as UTF-8 without one"
            raise UserError(f"--prompts {args.prompts} {why}") from None
    latent.check(prompts)
    return prompts


def choose_view(args, pipe, prompts, picture):
    """→ the frames to draw, how many there are in a row, and the title."""
    seed, psi, noise = args.seed, args.truncation, f"seed {args.seed}, psi {args.truncation:g}"
    if args.seeds:
        frames = pipe.view(views.seeds_by_prompts, prompts, args.seeds, psi)
        return frames, len(args.seeds), f"A seed for each column, psi {psi:g}"
    if args.truncation_sweep:
        frames = pipe.view(views.truncation_sweep, prompts, seed)
        return frames, len(views.SWEEP), f"From each prompt's mean picture to all variety, seed {seed}"
    if args.interpolate:
        frames = pipe.view(views.interpolation, prompts, seed, psi, args.steps, args.part)
        part = {"both": "global and local text", "global": "global text", "local": "local text"}[args.part]
        return frames, args.steps, f"Interpolation of the {part}, {noise}"
    if args.mix:
        frames = views.layer_mixing(pipe, *prompts, seed, psi)
        return frames, len(frames), f"The first layers use “{prompts[0]}”, the others “{prompts[1]}”, {noise}"
    if args.latent_walk:
        frames = pipe.view(views.latent_walk, prompts[0], seed, psi, args.steps)
        return frames, min(8, args.steps), f"A walk through the noise, psi {psi:g}"
    if args.like:
        from sampling import inversion  # not at the top: timm takes a second

        frames, title = inversion.frames(pipe, picture, prompts)
        print(title)
        return frames, len(frames) + 1, title
    columns = min(args.num, COLUMNS) if args.num > 1 else min(6, len(prompts))
    return pipe.frames(prompts, args.num, seed, psi), columns, ""


def check_view(args, prompts):
    """Raises UserError for arguments that do not fit together."""
    if (args.interpolate or args.mix) and len(prompts) > 2:
        raise UserError("--interpolate and --mix use their own two prompts; give no others")
    if args.interpolate and args.steps < 2:
        raise UserError("--steps 1: interpolation needs both ends; give 2 or more")
    if args.enlarge and len(prompts) > 1:
        raise UserError(f"--enlarge needs one prompt, which describes the picture; {len(prompts)} were given")
    if args.latent_walk and len(prompts) > 1:
        raise UserError(f"--latent-walk needs one prompt; {len(prompts)} were given")
    is_sequence = args.interpolate or args.latent_walk
    pictures = args.steps if is_sequence else len(prompts) * (len(args.seeds) if args.seeds else args.num)
    if pictures > files.MOST and not args.each:
        raise UserError(
            f"{pictures} pictures are too many for one file; ask for {files.MOST} at most, or draw with --each"
        )


def lay_out(pipe, frames, columns, title, with_experts, animated, picture):
    """Draws frames → PIL images: a grid, or the frames of an animation. picture: None, or the first panel."""
    drawn = pipe.draw(frames)
    panels, captions, experts = [to_pil(image) for image in drawn.images], drawn.captions, 0
    if with_experts:
        cell = panels[0].width
        maps = [[expert_map(index, cell) for index in routing.expert_index] for routing in drawn.routings.values()]
        panels = [Image.fromarray(np.hstack(strip)) for strip in zip(panels, *maps, strict=True)]
        experts = max(routing.logits.shape[-1] for routing in drawn.routings.values())
        where = ", ".join(f"{name.split('.')[0]}x{name.split('.')[0]} ({name})" for name in drawn.routings)
        title = f"{title}{'. ' if title else ''}Next to each picture, the expert of each point, at {where}"
    if picture is not None:
        panels = [ImageOps.pad(to_pil(picture), panels[0].size, color="white", centering=(0, 0)), *panels]
        captions = ["the picture", *captions]
    if animated:
        return animation(panels, captions, title, experts)
    return [grid(panels, captions, columns, title, experts)]


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
        if args.show:
            if args.prompt or args.prompts:
                raise UserError("--show draws nothing; give no prompt")
            for name, value in files.how_made(args.show).items():
                print(f"{name}: {''.join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))}")
            return
        prompts = read_prompts(args)
        check_view(args, prompts)
        if not args.each:
            files.check_picture(args.out, args.enlarge or args.like)
        elif args.each.exists() and not args.each.is_dir():
            raise UserError(f"--each {args.each} is a file; name a folder")
        stages = args.upsampler, args.resolution
        pipe = Pipeline.load(args.checkpoint, args.device, args.dtype, args.clip, *stages)
        latent.print_notes(pipe.clip, prompts)
        if args.enlarge:
            return enlarge(args, pipe, prompts)
        if args.experts and not any(level.attn_depth for level in pipe.generator.config.levels):
            raise UserError(f"--experts: {args.checkpoint} has no experts at this resolution; leave it out")
        if args.each:
            new = files.write_each(pipe, prompts, args.num, args.seed, args.truncation, args.each, args.checkpoint.name)
            print(f"{new} new pictures, {len(prompts) * args.num} in all, in {args.each.resolve()}")
            return
        own = pipe.generator.config.resolutions[-1]
        picture = files.read_picture(args.like, own) if args.like else None
        with torch.no_grad():
            frames, columns, title = choose_view(args, pipe, prompts, picture)
        pictures = lay_out(pipe, frames, columns, title, args.experts, args.out.suffix.lower() == ".gif", picture)
        about = {"prompts": prompts, "seed": args.seed, "psi": args.truncation, "checkpoint": args.checkpoint.name}
        files.save(pictures, args.out, about | {"command": " ".join(map(shlex.quote, ["sample.py", *sys.argv[1:]]))})
        size = pipe.resolution
        print(f"{len(frames)} pictures of {size}×{size} are in {args.out.resolve()}")


if __name__ == "__main__":
    main()
