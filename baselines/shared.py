"""What the systems of this folder share: `System`, and the command that trains one and draws with it.

python -m baselines.stylegan_t train --data emoji --minutes 60
python -m baselines.stylegan_t sample "red heart" --num 6
"""

import copy
import importlib
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from clip import Text, load_clip
from common import distributed, stopping
from common.cli import (
    Parser,
    UserError,
    a_path,
    a_truncation,
    add_data,
    errors_in_one_line,
    first_line,
    natural_number,
    positive_int,
)
from data import sources
from layers import parameter_groups
from sampling import latent
from sampling.files import MOST, check_picture, save
from sampling.pictures import columns_for, grid, in_range, to_pil
from step import ema_weight, rng_of
from training.loop import Loop
from training.run_folder import RunFolder
from weights.generator_file import generator_of, read_safetensors

SYSTEMS = {"StyleGANT": "stylegan_t", "LadaGAN": "ladagan", "Muse": "muse"}  # {class: its module}
RESOLUTIONS = 32, 64
NUM_PICTURES = 24  # in a grid of samples
IDENTITY = "data", "caption-key", "clip", "resolution", "batch", "seed"  # options that cannot change when a run resumes


class System:
    """The networks of a system, how they learn, and how they draw. A subclass builds the networks and adds `step`:

    step(number, images, text, noise) → {name: scalar}: one step of training, counted from 0, on images [B, 3, R, R] in
    [−1, 1] and the clip.Text of their captions. noise: a torch.Generator on the CPU, the only source of randomness.

    adam: arguments of torch.optim.Adam. learning: the networks that learn, by name. `networks` also contains `ema`, the
    moving average of the one called `averaged`. The run saves `networks` and `optimizers`; clip, a FrozenClip, is not
    among them.
    """

    averaged = "generator"
    for_sampling = ("ema",)  # the networks that drawing needs

    def __init__(self, clip, resolution, device, adam, **learning):
        self.clip, self.resolution, self.device = clip, resolution, device
        ema = copy.deepcopy(learning[self.averaged]).eval().requires_grad_(False)
        self.networks = nn.ModuleDict(learning | {"ema": ema}).to(device)
        self.optimizers = {}
        for name, network in learning.items():
            self.optimizers[name] = torch.optim.Adam(parameter_groups(network, adam["lr"]), **adam)

    def minimize(self, name, loss):
        """One step of a network down a loss. No other network gets gradients."""
        parameters = list(self.networks[name].parameters())
        self.optimizers[name].zero_grad(set_to_none=True)
        loss.backward(inputs=parameters)
        self.optimizers[name].step()

    @torch.no_grad()
    def update_average(self, number, batch, half_life):
        """Moves `ema` toward its network, as step.py does for Aurora. Buffers are copied."""
        ema, network = self.networks.ema, self.networks[self.averaged]
        weight = ema_weight(number, batch, half_life)
        torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), weight)
        for own, buffer in zip(ema.buffers(), network.buffers(), strict=True):
            own.copy_(buffer)

    def sample_z(self, count, noise):
        """z ~ N(0, 1), [count, z_dim]."""
        return torch.randn(count, self.networks.generator.z_dim, generator=noise).to(self.device)

    @torch.no_grad()
    def sample(self, text, seed, count, truncation=1.0):
        """`count` images for each of P captions, one caption after another: [P · count, 3, R, R] in [−1, 1]."""
        text = Text(*(x.repeat_interleave(count, dim=0) for x in text))
        return self.draw(text, torch.Generator().manual_seed(seed), truncation)

    def draw(self, text, noise, truncation):
        """An image for each caption. truncation: 1 is full variety, 0 the mean image of each caption."""
        z = self.sample_z(len(text.embedding), noise)
        return self.networks.ema(z, text.embedding, truncation).clamp(-1, 1)


def main(system_class):
    name = Path(sys.argv[0]).stem
    parser = Parser(description=system_class.__doc__)
    commands = parser.add_subparsers(required=True)
    commands.type = str  # argparse passes it all arguments of a command, whose own parser checks them
    training = commands.add_parser("train", help="learn from captioned images")
    add = training.add_argument
    add_data(add)
    add("--clip", default="emoji", help="emoji, a file of training/small_clip.py, or MODEL:WEIGHTS of open_clip")
    add("--resolution", type=int, choices=RESOLUTIONS, default=32)
    add("--minutes", type=positive_int, default=60, help="how long to train")
    add("--batch", type=positive_int, default=32, help="images of a step")
    add("--out", type=a_path, default=Path("runs") / name, help="the run's folder; a run in it is resumed")
    add("--seed", type=natural_number, default=0)
    add("--workers", type=natural_number, default=1, help="processes that load data")
    add("--save-every", type=positive_int, default=250, help="steps between checkpoints")
    add("--save-minutes", type=positive_int, default=15, help="minutes between checkpoints, if steps are slow")
    add("--sample-every", type=positive_int, default=250, help="steps between sample grids")
    add("--keep", type=positive_int, default=3, help="checkpoints to keep")
    training.set_defaults(run=train)
    sampling = commands.add_parser("sample", help="draw pictures")
    add = sampling.add_argument
    add("prompt", nargs="+", help="one or more texts, each in quotes")
    add("--num", type=positive_int, default=4, help="pictures for each prompt")
    add("--seed", type=natural_number, default=0)
    add("--truncation", type=a_truncation, default=1.0, help="1: full variety; 0: the mean picture of each prompt")
    generator = Path("runs") / name / "generator_ema.safetensors"
    add("--checkpoint", type=a_path, default=generator, help="a run's folder or its generator file")
    add("--out", type=a_path, default=Path("sample.png"), help="the picture to write")
    sampling.set_defaults(run=sample)
    args = parser.parse_args()
    with errors_in_one_line():
        args.run(system_class, name, args)


def as_texts(args):
    """The options of a command, for the files it writes."""
    return {option: str(value) for option, value in vars(args).items() if option != "run"}


def train(system_class, name, args):
    """Trains on one device."""
    device = distributed.start("auto")
    if distributed.world_size() > 1:
        raise UserError("a baseline learns in one process; start it without torchrun")
    with stopping.listening():
        run(system_class, name, args, device)


def run(system_class, name, args, device):
    identity = {option: getattr(args, option.replace("-", "_")) for option in IDENTITY}
    folder = RunFolder(args.out, {"system": name, **identity})
    state = folder.state()
    torch.manual_seed(args.seed)
    system = system_class(load_clip(args.clip, device), args.resolution, device)
    source = sources.open_data(args.data, args.resolution, args.seed, args.caption_key)
    captions = next(source.evaluation_batches(NUM_PICTURES)).captions
    loop = Loop(folder, args, args.batch, minutes=args.minutes)
    if state:
        with loop.resuming(state):
            restore(system, state)
    source.announce()
    save_run(loop, system)
    loop.check_saved()
    folder.write_config(as_texts(args))
    print(f"Training {name} on {device}; all in {args.out}")

    for number, batches in loop.steps(source):
        (batch,) = batches
        noise = rng_of(args.seed, number)
        scalars = system.step(number, batch.images.to(device), system.clip.read(batch.captions), noise)
        loop.log(loop.count(scalars, batches) | {"resolution": system.resolution})
        if loop.draws:
            images = system.sample(system.clip.read(captions), seed=1, count=1)
            folder.write_picture(grid([to_pil(image) for image in images], captions, columns=8), number + 1)
        if loop.saves:
            save_run(loop, system)

    save_run(loop, system)
    loop.conclude()


def save_run(loop, system):
    """Writes a checkpoint and the generator file, unless a weight is not finite."""
    if all(p.isfinite().all() for p in system.networks.parameters()):
        optimizers = {name: optimizer.state_dict() for name, optimizer in system.optimizers.items()}
        state = {"networks": system.networks.state_dict(), "optimizers": optimizers, "clip": system.clip.name}
        loop.save(state, generator_file(system, loop.notes(system.device)))
    else:
        distributed.say("note: a weight is not finite, so nothing is saved; lower the learning rate of this system")


def restore(system, state):
    """Loads a checkpoint. Raises ValueError if the run learned with another CLIP."""
    if state["clip"] != system.clip.name:
        raise ValueError(f"it learned with {state['clip']}, and its file is now {system.clip.name}; restore the file")
    system.networks.load_state_dict(state["networks"])
    for name, optimizer in system.optimizers.items():
        optimizer.load_state_dict(copy.deepcopy(state["optimizers"][name]))  # lets go of the checkpoint's file


def drawing_networks(system):
    """The networks that drawing needs, as one module."""
    return nn.ModuleDict({name: system.networks[name] for name in system.for_sampling})


def generator_file(system, notes):
    """→ tensors and metadata of the file that `load` reads."""
    about = {"resolution": system.resolution, "notes": notes}
    metadata = {"system": type(system).__name__, "about": json.dumps(about), "clip": system.clip.name}
    return drawing_networks(system).state_dict(), metadata


@torch.no_grad()
def sample(system_class, name, args):
    latent.check(args.prompt)
    check_picture(args.out)
    if (pictures := len(args.prompt) * args.num) > MOST:
        raise UserError(f"{pictures} pictures are too many for one file; ask for {MOST} at most")
    system, _ = load(system_class, args.checkpoint)
    latent.print_notes(system.clip.text, args.prompt)
    images = in_range(system.sample(system.clip.read(args.prompt), args.seed, args.num, args.truncation))
    captions = [prompt for prompt in args.prompt for _ in range(args.num)]
    picture = grid([to_pil(image) for image in images], captions, columns_for(args.num))
    save([picture], args.out, as_texts(args))
    print(f"{len(images)} picture(s) by {args.checkpoint}, written to {args.out.resolve()}")


def system_of(path):
    """The class of the system that wrote a generator file, or None if it is not of this folder."""
    try:
        with safe_open(path, "pt") as file:
            name = (file.metadata() or {}).get("system")
    except (OSError, SafetensorError):  # its next reader reports what is wrong
        return None
    return getattr(importlib.import_module(f"baselines.{SYSTEMS[name]}"), name) if name in SYSTEMS else None


def load(system_class, path, device="cpu"):
    """A run's folder or generator file → the system, ready to draw, and the run's notes. Raises UserError."""
    path = generator_of(path)
    metadata, tensors = read_safetensors(path)
    if (written_by := metadata.get("system")) != system_class.__name__:
        raise UserError(
            f"{path} is of {written_by or 'another command'}, not of {system_class.__name__}; give another file"
        )
    try:
        about, learned_with = json.loads(metadata["about"]), metadata["clip"]
        clip = load_clip(about["notes"]["clip"], device)
        system = system_class(clip, about["resolution"], torch.device(device))
        drawing_networks(system).load_state_dict(tensors)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged, or of an earlier version ({first_line(error)}); train it again") from error
    if clip.name != learned_with:
        name = about["notes"]["clip"]
        raise UserError(f"{path} learned with {learned_with}, but {name} is now {clip.name}; restore that file")
    return system, about["notes"]
