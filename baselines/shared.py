"""What the systems of this folder share: networks, optimizers, a moving average; and their command, which trains them
on captioned images and samples.

python baselines/stylegan_t.py train --data emoji --minutes 60
python baselines/stylegan_t.py sample "red heart" --num 6
"""

import argparse
import copy
import importlib
import inspect
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from clip import Text, load_clip
from common import distributed, stopping
from common.cli import (
    HelpFormatter,
    UserError,
    a_path,
    add_data,
    errors_in_one_line,
    finite_number,
    first_line,
    natural_number,
    positive_int,
)
from common.distributed import say
from data import sources
from layers import parameter_groups
from sampling import latent
from sampling.files import check_picture, read_picture, save
from sampling.pictures import grid, in_range, to_pil
from step import ema_weight, rng_of
from training.loop import Loop
from training.run_folder import RunFolder
from weights.generator_file import generator_of, read_safetensors

SYSTEMS = {"StyleGANT": "stylegan_t", "LadaGAN": "ladagan", "Muse": "muse"}  # the classes, and where they are
RESOLUTIONS = 32, 64
NUM_PICTURES = 24  # of a sample grid
IDENTITY = "data", "caption-key", "clip", "resolution", "batch", "seed"  # the options that a run keeps to its end

# ----------------------------------------------------------------------------------------------------------------------
# What a system is.


class System:
    """A generator and a discriminator as a run trains them. A subclass says how, in `step`, and draws, in `draw`.

    networks: generator, discriminator and ema, the moving average of the generator; optimizers: of the first two. The
    run saves and restores both by name. clip, a FrozenClip, never changes and is not among them.

    step(number, images, text, noise): one step of both networks and of the moving average, by the number-th batch:
    images [B, 3, R, R] in [−1, 1], the clip.Text of their captions, and a torch.Generator on the CPU, from which all
    that is random comes. → {name: scalar}
    draw(z, text, truncation): z [B, z_dim] and the clip.Text of B captions → images [B, 3, R, R] in [−1, 1], by the
    moving average.
    """

    for_sampling = ("ema",)  # the networks that drawing needs

    def __init__(self, clip, resolution, device, generator, discriminator, lr, betas):
        self.clip, self.resolution, self.device = clip, resolution, device
        ema = copy.deepcopy(generator).eval().requires_grad_(False)
        self.networks = {"generator": generator, "discriminator": discriminator, "ema": ema}
        self.networks = {name: network.to(device) for name, network in self.networks.items()}
        self.optimizers = {
            name: torch.optim.Adam(parameter_groups(self.networks[name], lr), betas=betas)
            for name in ("generator", "discriminator")
        }

    def sample_z(self, count, noise):
        """z ~ N(0, 1), [count, z_dim]."""
        return torch.randn(count, self.networks["generator"].z_dim, generator=noise).to(self.device)

    def sample(self, text, seed, count, truncation=1.0):
        """`count` images for each of P captions, one caption after the other: [P · count, 3, R, R] in [−1, 1]."""
        text = Text(*(x.repeat_interleave(count, dim=0) for x in text))
        z = self.sample_z(len(text.embedding), torch.Generator().manual_seed(seed))
        return self.draw(z, text, truncation)


@torch.no_grad()
def update_average(average, network, number, batch, half_life):
    """Moves a moving average toward a network, as step.py does Aurora's. Buffers are copied. batch: of this rank."""
    weight = ema_weight(number, batch * distributed.world_size(), half_life)
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), weight)
    for own, buffer in zip(average.buffers(), network.buffers(), strict=True):
        own.copy_(buffer)


def minimize(optimizer, loss):
    """One step of an optimizer down a loss. Only its own parameters get gradients, the means over all ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=parameters)
    distributed.average_gradients(parameters)
    optimizer.step()


# ----------------------------------------------------------------------------------------------------------------------
# The command.


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
    add("--edit", type=a_path, help="a picture that Muse changes toward the prompts, in the place of drawing new ones")
    add("--checkpoint", type=a_path, default=Path("runs") / name / "generator_ema.safetensors")
    add("--out", type=a_path, default=Path("sample.png"))
    sampling.set_defaults(run=sample)
    args = parser.parse_args()
    with errors_in_one_line():
        args.run(system_class, name, args)


def as_texts(args):
    """The options of a command, for its files."""
    return {option: str(value) for option, value in vars(args).items() if option != "run"}


def train(system_class, name, args):
    device = distributed.start("auto")
    try:
        with distributed.lost_ranks_reported(), stopping.listening():
            run(system_class, name, args, device)
    finally:
        distributed.stop()


def run(system_class, name, args, device):
    with distributed.together():
        if args.batch % distributed.world_size():
            raise UserError(f"--batch {args.batch} cannot be shared by {distributed.world_size()} ranks")
    identity = {option: getattr(args, option.replace("-", "_")) for option in IDENTITY}
    folder = RunFolder(args.out, {"system": name, **identity}, sharing={"workers": args.workers})
    state = folder.state("auto")
    torch.manual_seed(args.seed)
    with distributed.together():
        system = system_class(load_clip(args.clip, device), args.resolution, device)
        source = sources.open_data(args.data, args.resolution, args.seed, args.caption_key)
        captions = next(source.evaluation(NUM_PICTURES)).captions
        loop = Loop(folder, args, args.batch, minutes=args.minutes)
        if state:
            with loop.resuming(state):
                restore(system, state)
    for line in source.describe():
        say(line)
    save_run(loop, system)
    loop.check_saved()
    folder.write_config(as_texts(args))
    say(f"Training {name} on {device}, {distributed.world_size()} rank(s); all in {args.out}")

    for number, batches in loop.steps(source):
        (batch,) = batches
        noise = rng_of(args.seed, number * distributed.world_size() + distributed.rank())
        scalars = system.step(number, batch.images.to(device), system.clip.read(batch.captions), noise)
        loop.log(loop.count(scalars, batches) | {"resolution": system.resolution})
        if loop.draws:
            images = system.sample(system.clip.read(captions), seed=1, count=1)
            folder.write_picture(grid([to_pil(image) for image in images], captions, columns=8), {}, number + 1)
        if loop.saves:
            save_run(loop, system)

    save_run(loop, system)
    loop.conclude()


# ----------------------------------------------------------------------------------------------------------------------
# Files.


def save_run(loop, system):
    """Writes a checkpoint and the generator's file, unless a weight is not finite."""
    if all(p.isfinite().all() for network in system.networks.values() for p in network.parameters()):
        loop.save(state_of(system), generator_file(system, loop.notes(system.device)))


def drawing(system):
    """The networks that drawing needs, as one module."""
    return nn.ModuleDict({name: system.networks[name] for name in system.for_sampling})


def state_of(system):
    """What a run needs to go on, beside the networks in its generator's file."""
    optimizers = {name: optimizer.state_dict() for name, optimizer in system.optimizers.items()}
    others = {name: network for name, network in system.networks.items() if name not in system.for_sampling}
    return {"networks": nn.ModuleDict(others).state_dict(), "optimizers": optimizers, "clip": system.clip.name}


def restore(system, state):
    """Loads a checkpoint. Raises ValueError where the run learned with another CLIP."""
    if state["clip"] != system.clip.name:
        raise ValueError(f"it learned with {state['clip']}, and this is {system.clip.name}")
    nn.ModuleDict(system.networks).load_state_dict(state["networks"] | state["generator_file"])
    for name, optimizer in system.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])


def generator_file(system, notes):
    """What drawing needs → tensors and metadata of a file."""
    about = {"resolution": system.resolution, "notes": notes}
    metadata = {"system": type(system).__name__, "about": json.dumps(about), "clip": system.clip.name}
    return drawing(system).state_dict(), metadata


@torch.no_grad()
def sample(system_class, name, args):
    latent.check(args.prompt)
    check_picture(args.out)
    system, _ = load(system_class, args.checkpoint)
    options = {"truncation": args.truncation} if args.truncation != 1 else {}
    if args.edit:
        options["edit"] = read_picture(args.edit, system.resolution)
    for option in options:
        if option not in inspect.signature(system.sample).parameters:
            raise UserError(f"--{option}: {system_class.__name__} has none")
    latent.tell(system.clip.text, args.prompt)
    images = in_range(system.sample(system.clip.read(args.prompt), args.seed, args.num, **options))
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
        system = system_class(clip, about["resolution"], torch.device(device))
        drawing(system).load_state_dict(tensors)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged, or of an earlier version ({first_line(error)}); train it anew") from error
    return system, about["notes"]
