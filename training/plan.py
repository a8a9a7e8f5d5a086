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
from clip import BUILT_IN, FrozenClip, new_small, vocabulary_of
from common.cli import UserError
from experts import Experts, expert
from layers import pyramid
from losses import R1_INTERVAL
from presets import PRESETS, fitted_to
from training.step import Learner, Part

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


def rehearse(preset, clip_model, batch, dtype, parts=1):
    """A step of training at the highest resolution, for `batch` images in so many parts on one rank → Rehearsal.

    preset: a presets.Preset. The points are spread evenly over the experts, which is what the balance loss is for.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Experts, "forward", evenly))
        if dtype == torch.bfloat16:
            stack.enter_context(mock.patch.dict(attention.BLOCK, cpu=attention.BLOCK["cuda"]))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        meter = stack.enter_context(MemoryMeter())
        clip = clip_without_weights(clip_model)
        preset = fitted_to(preset, clip.width, clip.map_shapes)
        learner = Learner(preset, clip, torch.device("cpu"), dtype, batch)
        kept = parameters_and_state(learner, clip)
        rehearsed = [empty_part(learner, batch // parts) for _ in range(parts)]
        with FlopCounter() as drawing, torch.no_grad():
            learner.draw(rehearsed[0])
        figures = []
        learner.step(1, rehearsed)  # makes Adam's averages
        for number in (1, R1_INTERVAL):  # without R1, and with it
            meter.peak = meter.alive
            with FlopCounter() as counter:
                learner.step(number, rehearsed)
            figures.append((meter.peak, counter.total))
    (peak, flop), (peak_with_r1, flop_with_r1) = figures
    return Rehearsal(*kept, peak, peak_with_r1, flop, flop_with_r1, parts * drawing.total)


def empty_part(learner, size):
    """What a step learns from, of `size` images."""
    side, clip = learner.active[-1], learner.clip
    text = clip.encode_text(torch.zeros(size, clip.context_length, dtype=torch.long))
    real = pyramid(torch.empty(size, 3, side, side), learner.active)
    wrong = torch.zeros(size, dtype=torch.long)
    return Part(real, text, wrong, torch.empty(size, learner.generator.config.z_dim), torch.empty(size, 2, NUM_CHANCES))


def parameters_and_state(learner, clip):
    """→ parameters by part, how many of them learn, and the bytes kept from step to step by part."""
    generator, discriminator = learner.generator, learner.discriminator
    experts = sum(count(module) for module in generator.modules() if isinstance(module, Experts))
    parameters = {"generator": count(generator), "of it experts": experts, "discriminator": count(discriminator)}
    parameters["frozen CLIP"] = count(clip)
    learned = sum(p.numel() for network in (generator, discriminator) for p in network.parameters() if p.requires_grad)
    state = {
        "networks": 4 * (count(generator) + count(discriminator)),
        "gradients": 4 * learned,
        "Adam": 8 * learned,
        "moving average": 4 * count(generator),
        "CLIP": sum(t.numel() * t.element_size() for t in clip.state_dict().values()),
    }
    return parameters, learned, state


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
    few, more = (rehearse(preset, clip_model, images, torch.bfloat16) for images in (2, 4))
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
