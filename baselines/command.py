"""The command of every system in this folder: train on captioned images, and sample.

python baselines/stylegan_t.py train --data emoji --minutes 60
python baselines/stylegan_t.py sample "red heart" --num 6
"""

import argparse
import importlib
import inspect
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from baselines.system import RESOLUTIONS
from clip import load_clip
from common import distributed
from common.cli import (
    HelpFormatter,
    UserError,
    a_path,
    add_data,
    finite_number,
    first_line,
    natural_number,
    positive_int,
    told_in_one_line,
)
from common.disk import atomically
from common.distributed import say
from data import sources
from sampling import latent
from sampling.files import check_picture, save
from sampling.pictures import grid, in_range, to_pil
from step import noise_of
from training.loop import Loop, stopping_when_asked
from training.run_folder import RunFolder
from weights.checkpoint import generator_of, read_safetensors, without_prefix

SYSTEMS = {"StyleGANT": "stylegan_t", "LadaGAN": "ladagan", "Muse": "muse"}  # the classes, and where they are
NUM_PICTURES = 24
IDENTITY = (
    "data",
    "caption-key",
    "clip",
    "resolution",
    "batch",
    "seed",
    "unconditional",
)  # options that a run keeps to its end


def main(system_class):
    name = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(description=system_class.__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", formatter_class=HelpFormatter, help="learn from captioned images")
    add = training.add_argument
    add_data(add)
    add("--clip", default="emoji", help="emoji, a file of training/small_clip.py, or MODEL:WEIGHTS of open_clip")
    add("--resolution", type=int, choices=RESOLUTIONS, default=32)
    add("--minutes", type=positive_int, default=60, help="of training, after which the run ends")
    add("--batch", type=positive_int, default=32, help="over all ranks")
    add("--unconditional", action="store_true", help="without text, as LadaGAN's paper has it")
    add("--out", type=a_path, default=Path("runs") / name, help="the run's folder; a run in it is resumed")
    add("--seed", type=natural_number, default=0)
    add("--workers", type=natural_number, default=1, help="processes that load data")
    add("--save-every", type=positive_int, default=250, help="steps between checkpoints")
    add("--save-minutes", type=positive_int, default=15, help="minutes between checkpoints, where steps are slow")
    add("--sample-every", type=positive_int, default=250, help="steps between sample grids")
    add("--keep", type=positive_int, default=3, help="checkpoints to keep")
    training.set_defaults(run=train)
    sampling = commands.add_parser("sample", formatter_class=HelpFormatter, help="draw pictures")
    add = sampling.add_argument
    add("prompt", nargs="+", help="one or more texts, each in quotes")
    add("--num", type=positive_int, default=4, help="pictures for each prompt")
    add("--seed", type=natural_number, default=0)
    add("--truncation", type=finite_number, default=1.0, help="1 is all variety, 0 each prompt's mean picture")
    add("--checkpoint", type=a_path, default=Path("runs") / name / "generator_ema.safetensors")
    add("--out", type=a_path, default=Path("sample.png"))
    sampling.set_defaults(run=sample)
    args = parser.parse_args()
    with told_in_one_line():
        args.run(system_class, name, args)


class Trained:
    """A system of this folder as training/loop.py wants one."""

    parts = 1

    def __init__(self, system, args, captions):
        self.system, self.args, self.captions = system, args, captions
        self.batch, self.device = args.batch, system.device

    @property
    def phase(self):
        return f"{self.system.resolution}×{self.system.resolution}"

    def step(self, number, batches):
        (batch,) = batches
        clip, ranks = self.system.clip, distributed.world_size()
        text = clip.read(batch.captions)
        noise = noise_of(self.args.seed, number * ranks + distributed.rank())
        return self.system.step(number, batch.images.to(self.device), text, noise)

    def after_step(self, number):
        return {}

    def draw_samples(self):
        clip = self.system.clip
        images = self.system.sample(clip.read(self.captions), seed=1, count=1)
        return grid([to_pil(image) for image in images], self.captions, columns=8), {}

    def weights_are_finite(self):
        return all(p.isfinite().all() for network in self.system.networks.values() for p in network.parameters())

    def save_generator(self, path, state, notes):
        tensors = {
            f"{name}.{key}": value.contiguous()
            for name in self.system.for_sampling
            for key, value in state["networks"][name].items()
        }
        about = {"resolution": self.system.resolution, "unconditional": self.args.unconditional, "notes": notes}
        metadata = {"system": type(self.system).__name__, "about": json.dumps(about), "clip": self.system.clip.name}
        atomically(path, lambda temporary: save_file(tensors, temporary, metadata))

    def state_dict(self):
        kinds = {"networks": self.system.networks, "optimizers": self.system.optimizers}
        states = {kind: {name: x.state_dict() for name, x in members.items()} for kind, members in kinds.items()}
        return states | {"clip": self.system.clip.name}

    def load_state_dict(self, state):
        if state["clip"] != self.system.clip.name:
            raise ValueError(f"it learned with {state['clip']}, and this is {self.system.clip.name}")
        for kind, members in {"networks": self.system.networks, "optimizers": self.system.optimizers}.items():
            for name, x in members.items():
                x.load_state_dict(state[kind][name])


def build(system_class, clip, resolution, device, unconditional):
    """A system as its options say. Raises UserError where it has no unconditional form."""
    if not unconditional:
        return system_class(clip, resolution, device)
    if not takes(system_class, "unconditional"):
        raise UserError(f"--unconditional: {system_class.__name__} has no such form")
    return system_class(clip, resolution, device, unconditional=True)


def takes(function, parameter):
    """Whether a function, or a class's constructor, has a parameter, which not all systems' have."""
    return parameter in inspect.signature(function).parameters


def as_texts(args):
    """The options of a command, for its files."""
    return {option: str(value) for option, value in vars(args).items() if option != "run"}


def train(system_class, name, args):
    device = distributed.start("auto")
    try:
        with distributed.losses_told(), stopping_when_asked() as asked_to_stop:
            with distributed.together():
                if args.batch % distributed.world_size():
                    raise UserError(f"--batch {args.batch} cannot be shared by {distributed.world_size()} ranks")
            identity = {option: getattr(args, option.replace("-", "_")) for option in IDENTITY}
            folder = RunFolder(args.out, {"system": name, **identity}, sharing={"workers": args.workers})
            state = folder.state("auto")
            torch.manual_seed(args.seed)
            with distributed.together():
                system = build(system_class, load_clip(args.clip, device), args.resolution, device, args.unconditional)
                source = sources.open_data(args.data, args.resolution, args.seed, args.caption_key)
                captions = next(source.evaluation(NUM_PICTURES)).captions
                loop = Loop(Trained(system, args, captions), folder, source, args, asked_to_stop, minutes=args.minutes)
                if state:
                    loop.load(state)
            for line in source.describe():
                say(line)
            loop.introduce(as_texts(args))
            say(f"Training {name} on {device}, {distributed.world_size()} rank(s); all in {args.out}")
            loop.run()
            loop.conclude()
    finally:
        distributed.stop()


@torch.no_grad()
def sample(system_class, name, args):
    latent.check(args.prompt)
    check_picture(args.out)
    system, _ = load(system_class, args.checkpoint)
    if args.truncation != 1 and not takes(system.sample, "truncation"):
        raise UserError(f"--truncation: {system_class.__name__} has none")
    truncation = {} if args.truncation == 1 else {"truncation": args.truncation}
    latent.tell(system.clip.text, args.prompt)
    images = in_range(system.sample(system.clip.read(args.prompt), args.seed, args.num, **truncation))
    captions = [prompt for prompt in args.prompt for _ in range(args.num)]
    picture = grid([to_pil(image) for image in images], captions, columns=args.num)
    save([picture], args.out, as_texts(args))
    print(f"{len(images)} pictures by {args.checkpoint}, drawn in {args.out.resolve()}")


def system_of(path):
    """The class of the system that wrote a file, or None where none of this folder did. Raises UserError."""
    try:
        with safe_open(path, "pt") as file:
            name = (file.metadata() or {}).get("system")
    except (OSError, SafetensorError):  # whoever reads it next says what is wrong
        return None
    if name and name not in SYSTEMS:
        raise UserError(f"{path} was written by {name}, which is not known here")
    return getattr(importlib.import_module(f"baselines.{SYSTEMS[name]}"), name) if name else None


def load(system_class, path, device="cpu"):
    """A generator_ema.safetensors of `train` → the system, ready to draw, and its run's notes. Raises UserError."""
    path = generator_of(path)
    metadata, tensors = read_safetensors(path)
    if (written_by := metadata.get("system")) != system_class.__name__:
        raise UserError(f"{path} holds {written_by or 'nothing of this command'}, not {system_class.__name__}")
    try:
        about, learned_with = json.loads(metadata["about"]), metadata["clip"]
        clip = load_clip(about["notes"]["clip"], device)
        if clip.name != learned_with:
            raise UserError(f"{path} learned with {learned_with}, and {about['notes']['clip']} is {clip.name}")
        system = build(system_class, clip, about["resolution"], torch.device(device), about["unconditional"])
        for name in system.for_sampling:
            system.networks[name].load_state_dict(without_prefix(tensors, f"{name}."))
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged, or of an earlier version ({first_line(error)}); train it anew") from error
    return system, about["notes"]
