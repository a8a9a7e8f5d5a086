"""Trains Aurora: `python train.py` on a laptop, `torchrun train.py` on one GPU or on 64.

One step: a batch of captioned images; the discriminator learns to tell them from samples and right captions from wrong
ones; the generator learns against it and towards CLIP; the moving average follows. The resolution grows when the
generator's FID comes near that between two sets of real images, stops falling, or has had its images.
"""

import argparse
import dataclasses
import shlex
from pathlib import Path

import torch

from augment import check as check_augment
from clip import load_clip
from common import distributed
from common.cli import (
    HelpFormatter,
    UserError,
    a_path,
    add_data,
    first_line,
    natural_number,
    positive_int,
    told_in_one_line,
    with_fields,
)
from common.distributed import say
from data import sources
from evaluation.metrics import expert_counts
from growth import Growth, Phase
from presets import PRESETS, fitted_to
from sampling.inference import DTYPES, dtype_of
from sampling.pictures import grid, to_pil
from step import Learner
from training.loop import Loop, stopping_when_asked
from training.overfitting import OverfittingWatch
from training.plan import HARDWARE, auto_or_positive, choose_parts, print_plan
from training.run_folder import RunFolder
from training.small_clip import clip_for, ensure_small_clip, take_small_clip
from weights import checkpoint
from weights.perceptual import perceptual_network

NUM_PICTURES = 24


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="emoji", help="network sizes and training recipe, see presets.py")
    add_data(add)
    add("--out", type=a_path, help="the run's folder (default: runs/PRESET)")
    add("--steps", type=positive_int, help="total steps of the run (default: the preset's)")
    add("--batch", type=positive_int, help="global batch, over all ranks (default: the preset's)")
    add("--accumulate", type=auto_or_positive, default="auto", help="parts to make each batch in; auto: as a GPU needs")
    add("--seed", type=natural_number, default=0, help="of weights, data and noise")
    add("--resume", default="auto", help="auto: the run in --out; moved: its data lie elsewhere; no; or a checkpoint")
    add("--clip", help="train (a small one, on these pairs), emoji, a small one's file, or MODEL:WEIGHTS of "
        "open_clip (default: the preset's; a small preset on other data: train)")  # fmt: skip
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="other values of the recipe: lr_generator=1e-3 …")
    add("--init", type=a_path, help="start a new run from these weights: a generator_ema.safetensors, or a checkpoint")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bf16 where the device is fast at it")
    add("--save-every", type=positive_int, default=250, help="steps between checkpoints")
    add("--save-minutes", type=positive_int, default=15, help="minutes between checkpoints, where steps are slow")
    add("--keep", type=positive_int, default=3, help="checkpoints to keep, the last ones")
    add("--sample-every", type=positive_int, default=50, help="steps between sample grids")
    add("--workers", type=natural_number, default=1, help="processes that load data, for each rank; 0: the rank itself")
    add("--tensorboard", action="store_true", help="also write what `tensorboard --logdir OUT` shows")
    add("--plan", action="store_true", help="no training: what it would take, computed for GPUs, see training/plan.py")
    add("--gpus", type=positive_int, help="of --plan, beside 1, 8 and 64")
    add("--hardware", choices=HARDWARE, default="a100", help="of --plan")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / args.preset
    return args


class Run:
    """A run of Aurora: its networks, growth, data and folder. training/loop.py takes it through its steps."""

    def __init__(self, args, device, asked_to_stop=lambda: False):
        self.args, self.device = args, device
        with distributed.together():
            self.preset = preset_of(args)
            self.recipe = self.preset.recipe
            self.batch, clip = args.batch or self.recipe.batch, args.clip or clip_for(args.data, self.preset)
            self.dtype = dtype_of(args.dtype, device)
            options = self.preset, self.batch, clip, device, self.dtype, args.out / "plan.json"
            self.parts, self.r1_images = choose_parts(args.accumulate, *options)
        identity = {"preset": args.preset, "data": args.data, "batch": self.batch, "seed": args.seed, "clip": clip}
        identity["caption-key"] = args.caption_key
        sharing = {"accumulate": self.parts, "workers": args.workers}
        folder = RunFolder(args.out, identity, args.tensorboard, sharing)
        state = folder.state(args.resume)
        if clip == "train":
            clip = folder.path / "clip.safetensors"
            if state:
                take_small_clip(folder.last_good.parent.parent / clip.name, clip)
            else:
                ensure_small_clip(clip, args.data, args.caption_key, args.seed, device, asked_to_stop)
        with distributed.together():
            self.build(clip)
            self.loop = Loop(self, folder, self.source, args, asked_to_stop, args.steps or self.recipe.steps)
            if state:
                self.loop.load(state)
            if args.init and state:
                say(f"note: --init {args.init} is not used, as the run in {args.out} goes on")
            elif args.init:
                self.initialize(args.init)
        self.learner.learn_at(self.growth.active)

    def build(self, clip):
        """The networks and the data."""
        args, self.clip = self.args, load_clip(str(clip), self.device)
        preset = fitted_to(self.preset, self.clip.width, self.clip.map_shapes)
        torch.manual_seed(args.seed)
        if perceptual := perceptual_network(self.recipe):
            perceptual.to(self.device)
        self.learner = Learner(preset, self.clip, self.device, self.dtype, self.batch, perceptual, self.r1_images)
        self.growth = Growth(self.recipe, self.learner.resolutions, self.clip, args.seed, preset.generator)
        self.source = sources.open_data(args.data, self.learner.resolutions[-1], args.seed, args.caption_key)

    def initialize(self, path):
        """Starts from the weights of a generator_ema.safetensors, or of a checkpoint. Raises UserError."""
        try:
            missing = self.learner.load_weights(checkpoint.load_weights(path))
        except (RuntimeError, KeyError) as error:
            raise UserError(f"--init {path} does not fit preset {self.args.preset}: {first_line(error)}") from error
        say(f"Starting from the weights of {path}{'; new: ' if missing else ''}{', '.join(missing)}.")

    def train(self):
        """Goes on up to the last step. Raises Stopped where the run is asked to stop before."""
        loop = self.loop
        for line in self.source.describe():
            say(line)
        path = loop.folder.path / "reference.pt"
        if not self.growth.measure_reference(self.source, path, loop.asked_to_stop):
            raise sources.Stopped
        self.overfitting = OverfittingWatch(self.source, self.clip)
        self.introduce()
        loop.run()
        loop.conclude()
        say(f'Now: python sample.py "…" --checkpoint {shlex.quote(str(loop.folder.generator))}')

    def introduce(self):
        arguments = {name: str(value) for name, value in vars(self.args).items()}
        self.loop.introduce(arguments | {"steps": self.loop.steps, "recipe": dataclasses.asdict(self.recipe)})
        say(f"Training {self.args.preset} on {self.device}, {distributed.world_size()} rank(s); all in {self.args.out}")

    # ------------------------------------------------------------------------------------------------------------------
    # What the loop asks of a system.

    @property
    def phase(self):
        return f"{self.growth.active[-1]}×{self.growth.active[-1]}"

    def step(self, number, batches):
        return self.learner.step(number, self.learner.prepare(self.args.seed, number, batches))

    def after_step(self, number):
        """Measures the FID now and then, and grows when the resolution is learned."""
        self.growth.phase.images += self.batch
        report = {"resolution": self.growth.active[-1]}
        if number % max(1, self.recipe.fid_every // self.batch) == 0:
            report |= self.growth.evaluate(self.learner.ema)
            report |= self.overfitting.measure(self.learner, self.args.seed)
        if reason := self.growth.reason_to_grow():
            say(f"{self.phase} done: {self.growth.describe()}; {reason}.")
            self.growth.grow()
            self.learner.learn_at(self.growth.active)
        return report

    @torch.no_grad()
    def draw_samples(self):
        """A grid of fixed prompts and fixed z, by the moving average, and how the experts share the points."""
        captions, given = self.growth.captions[:NUM_PICTURES], [x[:NUM_PICTURES] for x in self.growth.given]
        ema = self.learner.ema
        text = self.clip.read(captions)
        z = torch.randn(len(captions), ema.config.z_dim, generator=torch.Generator().manual_seed(1))
        given = [images.to(self.device) for images in given]
        output = ema(*given, z.to(self.device), text.tokens, text.eot, self.growth.active[-1])
        loads = {name: count / count.sum() for name, count in expert_counts(output.routings).items()}
        return grid([to_pil(image) for image in output.image], captions, columns=8), loads

    def weights_are_finite(self):
        return self.learner.weights_are_finite()

    def save_generator(self, path, state, notes):
        resolution = self.learner.resolutions[state["phase"]["number"]]
        about = notes | {"resolution": resolution}
        checkpoint.save_generator(path, self.learner.ema, self.clip, resolution, about, state["ema"])

    def state_dict(self):
        return {"phase": dict(vars(self.growth.phase)), **self.learner.state_dict()}

    def load_state_dict(self, state):
        self.growth.phase = Phase(**state["phase"])
        for name, (then, now) in self.learner.load_state_dict(state).items():
            say(f"note: the learning rate of {name} was {then:g}, and the recipe now says {now:g}, which is taken")


def preset_of(args):
    """The preset, its recipe changed by --set. Raises UserError."""
    preset = PRESETS[args.preset]
    recipe = with_fields(preset.recipe, "--set", args.set)
    check_augment(recipe.augment)
    return dataclasses.replace(preset, recipe=recipe)


def main():
    args = parse_args()
    with told_in_one_line():
        if args.plan:
            return print_plan(args, preset_of(args))
        device = distributed.start(args.device)
        try:
            with distributed.losses_told(), stopping_when_asked() as asked_to_stop:
                Run(args, device, asked_to_stop).train()
        finally:
            distributed.stop()


if __name__ == "__main__":
    main()
