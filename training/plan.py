"""What a run would take, computed without running it: memory, FLOP, bytes on the wire, and so its time.

    python train.py --plan --preset aurora-64 --gpus 64

One step is gone through with tensors that have shapes and no content. What it would allocate and multiply is counted;
tests hold that against real steps. Seconds are those counts divided by the figures of HARDWARE, and a guess.
"""

import contextlib
import weakref
from dataclasses import dataclass
from unittest import mock

import open_clip
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import attention
from augment import NUM_CHANCES
from aurora import Generator
from clip import BUILT_IN, FrozenClip, new_small, vocabulary_of
from common.cli import UserError
from discriminator import Discriminator
from experts import Experts, expert
from layers import parameter_groups, pyramid
from losses import R1_INTERVAL, DiscriminatorLoss, generator_loss
from presets import PRESETS, fitted_to

UTILIZATION = 0.25  # of the peak rate, the guess: what convolutions and small matrices leave of it in such networks
WIDTHS = (5, 14, 12, 12, 10, 10, 10, 10, 10)  # of the table's columns
DECODED = 300  # pictures of 256×256 that a data worker reads in a second, another guess


@dataclass(frozen=True)
class Hardware:
    """A GPU by its maker's data sheet. Bytes a second are those of an all-reduce, for each GPU."""

    name: str
    flop_rate: float  # bfloat16, dense
    memory: float
    within_node: float  # over NVLink, 8 GPUs
    between_nodes: float  # one 200 Gb/s adapter a GPU


HARDWARE = {
    "a100": Hardware("A100 80 GB", 312e12, 80e9, 300e9, 25e9),
    "h100": Hardware("H100 80 GB", 989e12, 80e9, 450e9, 50e9),
}


class FlopCounter(TorchDispatchMode):
    """Adds up PyTorch's own formulas. Its FlopCounterMode also says which module, and cannot follow R1 for that."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class MemoryMeter(TorchDispatchMode):
    """Adds up the bytes of all tensors alive, and remembers the most there were."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.sizes = 0, 0, weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        if storage not in self.sizes:
            self.sizes[storage] = storage.nbytes()
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.release, storage.nbytes())

    def release(self, size):
        self.alive -= size


@dataclass
class Rehearsal:
    """What one rank's step takes."""

    parameters: dict[str, int]  # by part
    trained: int  # parameters whose gradients are averaged over ranks
    state: dict[str, int]  # bytes kept from step to step, by part
    peak: int  # bytes at most
    peak_with_r1: int  # of a step with R1, one in so many
    flop: int
    flop_with_r1: int
    flop_of_drawing: int  # the generator's forward pass alone


def rehearse(preset, clip_model, batch, resolution, narrow):
    """A step of train.py for `batch` images at a resolution → Rehearsal. narrow: in bfloat16, as on a GPU.

    preset: a presets.Preset. The points are spread evenly over the experts, which is what the balance loss is for.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Experts, "forward", evenly))
        if narrow:
            stack.enter_context(mock.patch.dict(attention.BLOCK, cpu=attention.BLOCK["cuda"]))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        meter = stack.enter_context(MemoryMeter())
        clip = clip_without_weights(clip_model)
        preset = fitted_to(preset, clip.width, clip.map_shapes)
        generator, discriminator = Generator(preset.generator), Discriminator(preset.discriminator)
        ema = Generator(preset.generator).requires_grad_(False)
        generator.synthesis.recompute = preset.recipe.recompute
        for level in generator.synthesis.levels:
            level.requires_grad_(level.resolution <= resolution)
        for modules in (discriminator.stages, discriminator.heads):
            for name, module in modules.items():
                module.requires_grad_(int(name) <= resolution)
        active = [level.resolution for level in preset.generator.levels if level.resolution <= resolution]
        networks = (generator, discriminator)
        optimizers = [torch.optim.Adam(parameter_groups(network, 1e-3), betas=(0.0, 0.99)) for network in networks]
        objective = DiscriminatorLoss(discriminator, clip, preset.recipe)
        trained = [p for network in networks for p in network.parameters() if p.requires_grad]
        resting = [p for p in discriminator.parameters() if not p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()  # makes Adam's averages

        def step(r1_interval):
            images, z = torch.randn(batch, 3, active[-1], active[-1]), torch.randn(batch, preset.generator.z_dim)
            real, wrong = pyramid(images, active), torch.zeros(batch, dtype=torch.long)
            chances = torch.rand(batch, 2, NUM_CHANCES)
            text = clip.encode_text(torch.zeros(batch, clip.context_length, dtype=torch.long))
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                with FlopCounter() as drawing:
                    output = generator(z, text.tokens, text.eot, active[-1])
                fake = {r: image.detach() for r, image in output.pyramid.items()}
                report = objective(real, fake, text, wrong, chances, r1_interval)
            optimizers[1].zero_grad()
            report["loss"].backward()
            optimizers[1].step()
            discriminator.requires_grad_(False)
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                report = generator_loss(output, text, wrong, chances[:, 1], discriminator, clip, preset.recipe)
            optimizers[0].zero_grad()
            report["loss"].backward()
            optimizers[0].step()
            discriminator.requires_grad_(True)
            for parameter in resting:
                parameter.requires_grad_(False)
            torch._foreach_lerp_(list(ema.parameters()), list(generator.parameters()), 0.1)
            return drawing.total

        figures = []
        for r1_interval in (0, R1_INTERVAL):
            meter.peak = meter.alive
            with FlopCounter() as counter:
                flop_of_drawing = step(r1_interval)
            figures.append((meter.peak, counter.total))
    (peak, flop), (peak_with_r1, flop_with_r1) = figures
    experts = sum(count(module) for module in generator.modules() if isinstance(module, Experts))
    parameters = {"generator": count(generator), "of it experts": experts, "discriminator": count(discriminator)}
    learned = sum(p.numel() for p in trained)
    state = {
        "networks": 4 * (count(generator) + count(discriminator)),
        "gradients": 4 * learned,
        "Adam": 8 * learned,
        "moving average": 4 * count(generator),
        "CLIP": sum(t.numel() * t.element_size() for t in clip.state_dict().values()),
    }
    parameters["frozen CLIP"] = count(clip)
    return Rehearsal(parameters, learned, state, peak, peak_with_r1, flop, flop_with_r1, flop_of_drawing)


def count(module):
    return sum(p.numel() for p in module.parameters())


def evenly(self, points, expert_index, gate):
    """Stands in for Experts.forward: which expert takes a point depends on its content, the work does not."""
    share = -(-len(points) // len(self.proj_in))
    stacks = zip(points.split(share), self.proj_in, self.bias_in, self.proj_out, self.bias_out, strict=False)
    outputs = torch.cat([expert(part, *weights) for part, *weights in stacks])
    return torch.empty_like(outputs).index_copy(0, expert_index.argsort(), outputs) * gate[:, None]


def clip_without_weights(spec):
    """The CLIP of a preset or of --clip, by its sizes alone."""
    if path := BUILT_IN.get(spec):
        return new_small(vocabulary_of(path))
    name = spec.partition(":")[0]
    if name not in open_clip.list_models():
        raise UserError(f"--clip {spec}: --plan needs a model of open_clip, as ViT-L-14-quickgelu:openai, or small")
    return FrozenClip(open_clip.CLIP(**open_clip.get_model_config(name)), spec)


# ----------------------------------------------------------------------------------------------------------------------
# What is printed.


def plan(name, clip_model, batch, gpus, hardware, workers):
    """The lines of `train.py --plan`: one table for 1, 8, 64 and the given number of GPUs.

    Two rehearsals, of 2 and of 4 images, tell what does not depend on the batch from what each image takes.
    """
    preset = PRESETS[name]
    resolution = preset.generator.levels[-1].resolution
    few, more = (rehearse(preset, clip_model, images, resolution, narrow=True) for images in (2, 4))
    an_image = (more.peak_with_r1 - few.peak_with_r1) / 2
    fixed = few.peak_with_r1 - 2 * an_image
    flop = (more.flop + (more.flop_with_r1 - more.flop) / R1_INTERVAL) / 4
    yield f"{name} at {resolution}×{resolution} on {hardware.name}, global batch {batch}, CLIP {clip_model}"
    yield "  parameters, M:       " + figures(few.parameters, 1e6)
    yield "  memory kept, GB:     " + figures(few.state, 1e9)
    yield f"  memory at the peak:  {fixed / 1e9:.3g} GB, and {an_image / 1e9:.3g} GB for each image of a part"
    yield f"  work of an image:    {flop / 1e12:.3g} TFLOP, R1 in one step of {R1_INTERVAL} included"
    if (fits := int((0.95 * hardware.memory - fixed) / an_image)) < 2:
        yield f"  It does not fit: two images take {(fixed + 2 * an_image) / 1e9:.0f} GB."
        return
    heads = ("GPUs", "--accumulate", "memory, GB", "compute, s", "wire, GB", "wire, s", "data, s", "step, s", "days")
    yield "".join(f"{head:>{width}s}" for head, width in zip(heads, WIDTHS, strict=True)) + "   bound by"
    for number in sorted({1, 8, 64, gpus}):
        if batch % number:
            continue
        share = batch // number
        parts = next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= fits)
        again = more.flop_of_drawing / 4 if parts > 1 else 0
        wire = 2 * (number - 1) / number * 4 * few.trained
        seconds = {
            "compute": share * (flop + again) / (hardware.flop_rate * UTILIZATION),
            "the wire": wire / (hardware.within_node if number <= 8 else hardware.between_nodes),
            "data": share / (DECODED * max(1, workers)),
        }
        step = max(seconds.values())
        memory = fixed + share / parts * an_image
        row = number, parts, memory / 1e9, seconds["compute"], wire / 1e9, seconds["the wire"], seconds["data"], step
        days = preset.recipe.steps * step / 86400
        cells = zip((*row, days), WIDTHS, strict=True)
        yield "".join(f"{value:{width}.3g}" for value, width in cells) + f"   {max(seconds, key=seconds.get)}"
    yield f"{preset.recipe.steps:,} steps; compute, wire and data go on at the same time. Parameters, memory and FLOP"
    yield "are held against real steps on a CPU by tests/test_plan.py. Nothing was ever measured on a GPU. Guesses:"
    rate = f"{hardware.flop_rate / 1e12:.0f} TFLOP/s"
    yield f"compute at {UTILIZATION:.0%} of {rate}, a worker reads {DECODED} pictures a second."


def figures(numbers, unit):
    return ", ".join(f"{name} {number / unit:,.4g}" for name, number in numbers.items())
