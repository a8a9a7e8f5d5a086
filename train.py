"""Trains Aurora: `python train.py` on a laptop, `torchrun train.py` on one GPU or on 64.

In a step, the discriminator learns to tell images from samples and right captions from wrong ones, then the generator
learns against it and towards CLIP, and the moving average follows. The resolution grows when the generator's FID comes
near the FID between two sets of real images, when it stops falling, or after a number of images.
"""

import argparse
import contextlib
import dataclasses
import shlex
from pathlib import Path
from typing import NamedTuple

import torch

from augment import check as check_augment
from clip import load_clip
from common import distributed, stopping
from common.cli import (
    Parser,
    UserError,
    a_path,
    add_data,
    errors_in_one_line,
    natural_number,
    positive_int,
    with_fields,
)
from common.distributed import say
from data import sources
from growth import Growth, Phase
from presets import PRESETS
from sampling import latent
from sampling.inference import DTYPES, dtype_of
from sampling.pictures import grid, to_pil
from step import Learner
from training.loop import Loop, overfitting, watched_pairs
from training.plan import print_plan
from training.run_folder import RunFolder
from training.small_clip import clip_for, clip_of_new_run
from weights import checkpoint, generator_file
from weights.efficientnet import load_efficientnet

NUM_PICTURES = 24
MOST_BATCH = 2**16  # images of a step


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="emoji", help="network sizes and training recipe, see presets.py")
    add_data(add)
    add("--out", type=a_path, help="the run's folder (default: runs/PRESET); a run in it is resumed")
    add("--steps", type=positive_int, help="total steps of the run (default: the preset's)")
    add("--batch", type=positive_int, help="global batch, over all ranks (default: the preset's)")
    add("--accumulate", type=positive_int, default=1, help="micro-batches of each batch, to save memory; see --plan")
    add("--seed", type=natural_number, default=0, help="of weights, data and noise")
    add("--clip", help="train (a small CLIP on --data), emoji, a small CLIP's file, or MODEL:WEIGHTS of "
        "open_clip (default: the preset's; for a small preset on other data: train)")  # fmt: skip
    add("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
        help="change the recipe: lr_generator=1e-3 …")  # fmt: skip
    add("--init", type=a_path, help="start a new run from these weights: a generator_ema.safetensors, or a checkpoint")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bf16 if the device is fast at it")
    add("--save-every", type=positive_int, default=250, help="steps between checkpoints")
    add("--save-minutes", type=positive_int, default=15, help="minutes between checkpoints, if steps are slow")
    add("--keep", type=positive_int, default=3, help="number of checkpoints to keep")
    add("--sample-every", type=positive_int, default=50, help="steps between sample grids")
    add("--workers", type=natural_number, default=1, help="processes that load data, for each rank; 0: the rank itself")
    add("--plan", action="store_true", help="do not train; compute what training takes on GPUs, see training/plan.py")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / args.preset
    return args


class Run(NamedTuple):
    """What a run consists of."""

    args: argparse.Namespace
    learner: Learner
    growth: Growth
    source: sources.Source
    loop: Loop


def build(args, device):
    """Builds a new run, or one from its last checkpoint → Run. Raises UserError; Stopped while a small CLIP learns."""
    with distributed.together():  # an error on one rank ends all
        preset = preset_of(args)
        recipe, clip = preset.recipe, args.clip or clip_for(args.data, preset)
        batch, dtype = args.batch or recipe.batch, dtype_of(args.dtype, device)
    identity = {"preset": args.preset, "data": args.data, "batch": batch, "seed": args.seed, "clip": clip}
    identity["caption-key"] = args.caption_key
    folder = RunFolder(args.out, identity)
    state = folder.state()
    if clip == "train":
        clip = folder.path / "clip.safetensors"
        if not state:
            clip_of_new_run(clip, args.data, args.caption_key, args.seed, device)
    with distributed.together():
        if isinstance(clip, Path) and not clip.is_file():
            raise UserError(f"{clip} is missing, the small CLIP that this run learned with; put it back")
        clip = load_clip(str(clip), device)
        torch.manual_seed(args.seed)
        perceptual = load_efficientnet(features_only=True).to(device) if recipe.perceptual_weight else None
        learner = Learner(preset, clip, device, dtype, batch, perceptual)
        growth = Growth(recipe, learner.resolutions, clip, args.seed, preset.generator)
        source = sources.open_data(
            args.data, learner.resolutions[-1], args.seed, args.caption_key, preset.discriminator.group
        )
        loop = Loop(folder, args, batch, args.accumulate, args.steps or recipe.steps)
        run = Run(args, learner, growth, source, loop)
        if state:
            resume(run, state)
        elif args.init:
            start_from(args, learner, growth)
    learner.learn_at(growth.active)
    return run


def resume(run, state):
    """Restores everything from a checkpoint's state. Raises UserError if they do not fit together."""
    args, learner, growth, source, loop = run
    with loop.resuming(state):
        if source.holds_out and not state["holds_out"]:
            say("note: when this run began, its data had too few pairs to hold any out; so none is now")
            source.holds_out = False
        growth.phase = Phase(**state["phase"])
        state["ema"] = checkpoint.moving_average(state)
        learner.load_state_dict(state)
        for name, then in state["recipe"].items():
            if (now := getattr(learner.recipe, name, then)) != then:
                say(f"note: {name} was {then}; now it is {now}")
    if args.init:
        say(f"note: --init {args.init} is not used, because the run in {args.out} is resumed")


def check_division(batch, micro_batches, group):
    """Raises UserError if a micro-batch has no wrong captions, if each rank's part of it is not of whole groups, or if
    the batch is so large that it must be a mistake.
    """
    ranks = distributed.world_size()
    if batch > MOST_BATCH:
        raise UserError(f"--batch {batch}: give {MOST_BATCH} or fewer")
    if batch // micro_batches < 2:
        raise UserError(
            f"--batch {batch} in {micro_batches} part(s) leaves no wrong caption to compare with; take 2 or more each"
        )
    if batch % (ranks * micro_batches * group):
        raise UserError(
            f"--batch {batch} cannot be shared by {ranks} ranks in {micro_batches} parts, of groups of {group} images; "
            f"choose a multiple of {ranks * micro_batches * group}"
        )


def preset_of(args):
    """The preset, its recipe changed by --set. Raises UserError."""
    preset = PRESETS[args.preset]
    for name in ("steps", "batch"):
        if getattr(args, name) and any(field.startswith(f"{name}=") for field in args.set):
            raise UserError(f"--{name} and --set {name}=… contradict each other; give one of them")
    recipe = with_fields(preset.recipe, "--set", args.set)
    check_augment(recipe.augment)
    preset = dataclasses.replace(preset, recipe=recipe)
    for name, least in (("steps", 1), ("fid_samples", 2), ("clip_lower_every", 1)):
        if (value := getattr(recipe, name)) < least:
            raise UserError(f"--set {name}={value}: give {least} or more")
    if not (recipe.adversarial_weight or recipe.clip_weight or recipe.l1_weight or recipe.perceptual_weight):
        raise UserError(f"--set leaves {args.preset} nothing to learn from; give adversarial_weight or clip_weight")
    if recipe.momentum_generator >= 1:
        raise UserError(f"--set momentum_generator={recipe.momentum_generator}: give less than 1, such as 0.9")
    if recipe.crop not in preset.crops:
        raise UserError(f"--set crop={recipe.crop}: choose one of {', '.join(map(str, preset.crops))}")
    check_division(args.batch or recipe.batch, args.accumulate, preset.discriminator.group)
    return preset


def start_from(args, learner, growth):
    """Loads the weights that --init names, and starts at the highest resolution that they draw. Raises UserError."""
    try:
        missing = learner.load_weights(checkpoint.load_weights(args.init))
    except (RuntimeError, KeyError) as error:
        message = f"--init {args.init} does not fit preset {args.preset}, whose networks have other sizes"
        raise UserError(f"{message}; give the preset that it was trained with") from error
    if not learner.weights_are_finite():
        raise UserError(f"--init {args.init} has weights that are not finite; give another file")
    for level in learner.ema.synthesis.levels:
        if level.to_rgb and level.to_rgb.weight.any():  # zero until it learns
            growth.phase = Phase(learner.resolutions.index(level.resolution))
    resolution = growth.active[-1]
    new = f"; new: {', '.join(missing)}" if missing else ""
    say(f"Starting at {resolution}×{resolution} from the weights of {args.init}{new}.")


def train(run):
    """Trains to the last step. Raises UserError, and Stopped if the run is asked to stop earlier."""
    args, learner, growth, source, loop = run
    recipe, batch, folder = learner.recipe, learner.batch, loop.folder
    source.announce()
    save(run)
    loop.check_saved()
    growth.measure_reference(source, folder.path / "reference.pt")
    if note := latent.unread(learner.clip.text, growth.captions):
        say(note)
    if len(set(growth.captions)) == 1:
        say("note: all captions are the same, so the generator learns nothing about text")
    pairs = None
    with distributed.together(), contextlib.suppress(stopping.Stopped):  # then the loop ends at once
        group = learner.discriminator.group
        pairs = watched_pairs(source, learner.clip, group) if recipe.adversarial_weight else None
    folder.write_config({**vars(args), "steps": loop.last_step, "recipe": dataclasses.asdict(recipe)})
    say(f"Training {args.preset} on {learner.device}, {distributed.world_size()} rank(s); all in {args.out}")

    for number, batches in loop.steps(source):
        report = learner.step(number, learner.prepare(args.seed, number, batches))
        report = loop.count(report, batches) | {"resolution": growth.active[-1]}
        growth.phase.images += batch
        is_due = (number + 1) % max(1, recipe.fid_every // batch) == 0
        if is_due and not loop.rejected_in_a_row:  # NaN has no FID, and the guard may soon end the run
            report |= growth.evaluate(learner.ema)
            report |= overfitting(learner, pairs, args.seed)
        if reason := growth.reason_to_grow():
            say(f"{growth.active[-1]}×{growth.active[-1]} done: {growth.describe()}; {reason}.")
            growth.grow()
            learner.learn_at(growth.active)
        loop.log(report)
        if loop.draws:
            folder.write_picture(draw_samples(learner, growth), number + 1)
        if loop.saves:
            save(run)

    save(run)
    loop.conclude()
    say(f'Now: python sample.py "…" --checkpoint {shlex.quote(str(folder.generator))}')


@torch.no_grad()
def draw_samples(learner, growth):
    """The moving average's grid for fixed prompts and fixed z."""
    captions, given = growth.captions[:NUM_PICTURES], [x[:NUM_PICTURES].to(learner.device) for x in growth.given]
    text = learner.clip.read(captions)
    z = torch.randn(len(captions), learner.ema.config.z_dim, generator=torch.Generator().manual_seed(1))
    output = learner.ema(*given, z.to(learner.device), text.tokens, text.eot, growth.active[-1])
    return grid([to_pil(image) for image in output.image], captions, columns=8)


def save(run):
    """Writes a checkpoint, unless a weight is not finite; see weights/checkpoint.py for what is in it."""
    _, learner, growth, source, loop = run
    if learner.weights_are_finite():
        resolution = growth.active[-1]
        notes = loop.notes(learner.device) | {"resolution": resolution}
        generator = generator_file.content(learner.ema, learner.clip, resolution, notes)
        state = {"phase": dict(vars(growth.phase)), "recipe": vars(learner.recipe), "holds_out": source.holds_out}
        state |= learner.state_dict()
        del state["ema"]  # it is in the generator's file
        loop.save(state, generator)
    else:
        say("note: a weight is not finite, so nothing is saved; lower the learning rates with --set lr_generator=…")


def main():
    args = parse_args()
    with errors_in_one_line():
        if args.plan:
            return print_plan(args, preset_of(args))
        try:
            with distributed.ranks(args.device) as device, stopping.listening():
                train(build(args, device))
        except torch.OutOfMemoryError as error:
            advice = "give the same command with a larger --accumulate; --plan computes which"
            raise UserError(f"the batch does not fit into the GPU's memory; {advice}") from error


if __name__ == "__main__":
    main()
