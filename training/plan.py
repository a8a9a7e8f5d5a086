"""What a run would take, computed without running it: memory, FLOP, bytes on the wire, and so its time.

    python train.py --plan --preset aurora-64 --gpus 64

One step is gone through with tensors that have shapes and no content. What it would allocate and multiply is counted;
tests hold that against real steps. Seconds are those counts divided by the figures of HARDWARE, and by UTILIZATION.
"""

import contextlib
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import open_clip
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import attention
from augment import NUM_CHANCES
from clip import BUILT_IN, MiniLM, from_open_clip, new_small
from common import distributed
from common.cli import UserError, positive_int
from common.distributed import say
from experts import Experts, expert
from layers import pyramid
from losses import R1_INTERVAL
from presets import fitted_to
from step import Learner, Part
from upsampler import given_images, input_noise
from weights.perceptual import perceptual_network

# The share of the peak rates that is reached. On an H200, which has an H100's rates, steps of aurora-64 in parts of 16
# take 1.38 s on average, 1.40 s by these; how the two share that time is a guess. So are the bytes to leave for
# CUDA's context, NCCL's buffers and fragmentation, and the pictures of 256×256 that a data worker reads in a second.
UTILIZATION = {torch.bfloat16: 0.1, torch.float32: 0.2}
RESERVED = 10e9
DECODED = 300
REHEARSED = 4  # images of a rehearsed step
WIDTHS = (5, 14, 12, 12, 10, 10, 10, 10, 10)  # the table's columns, in characters


@dataclass(frozen=True)
class Hardware:
    """A GPU by its maker's data sheet. Bytes a second are those of an all-reduce, for each GPU."""

    name: str
    flop_rate: dict[torch.dtype, float]  # dense; float32 without TF32, as train.py asks for
    memory: float
    within_node: float  # over NVLink, 8 GPUs
    between_nodes: float  # one 200 Gb/s adapter a GPU

    def seconds(self, flop):
        """The time that {dtype: FLOP} take."""
        return sum(count / (self.flop_rate[dtype] * UTILIZATION[dtype]) for dtype, count in flop.items())


HARDWARE = {
    "a100": Hardware("A100 80 GB", {torch.bfloat16: 312e12, torch.float32: 19.5e12}, 80e9, 300e9, 25e9),
    "h100": Hardware("H100 80 GB", {torch.bfloat16: 989e12, torch.float32: 67e12}, 80e9, 450e9, 50e9),
}


class FlopCounter(TorchDispatchMode):
    """Adds up PyTorch's own formulas, by the dtype of what is multiplied.

    PyTorch's FlopCounterMode also says which module, and cannot follow R1 for that.
    """

    def __init__(self):
        super().__init__()
        self.by_dtype = Counter()

    @property
    def total(self):
        return self.by_dtype.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            dtype = next(leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
            self.by_dtype[dtype] += formula(*args, **(kwargs or {}), out_val=out)
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
    flop: dict[torch.dtype, int]
    flop_with_r1: dict[torch.dtype, int]


def rehearse(preset, clip_model, batch, dtype, parts=1, resolution=None):
    """A step of training for `batch` images in so many parts on one rank → Rehearsal.

    preset: a presets.Preset. resolution: the highest active one, by default of all. The points are spread evenly over
    the experts, which is what the balance loss is for.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Experts, "forward", evenly))
        if dtype == torch.bfloat16:
            on_gpu = attention.fused_l2_attention or attention.blockwise_l2_attention
            stack.enter_context(mock.patch.object(attention, "blockwise_l2_attention", on_gpu))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        meter = stack.enter_context(MemoryMeter())
        clip = clip_without_weights(clip_model)
        preset = fitted_to(preset, clip.width, clip.map_shapes)
        perceptual = perceptual_network(preset.recipe, with_weights=False)
        learner = Learner(preset, clip, torch.device("cpu"), dtype, batch, perceptual)
        learner.learn_at([r for r in learner.resolutions if r <= (resolution or learner.resolutions[-1])])
        kept = parameters_and_state(learner, clip)
        rehearsed = [empty_part(learner, batch // parts) for _ in range(parts)]
        learner.step(1, rehearsed)  # makes Adam's averages
        peaks, flop = [], []
        for number in (1, R1_INTERVAL):  # without R1, and with it
            meter.peak = meter.alive
            with FlopCounter() as counter:
                learner.step(number, rehearsed)
            peaks.append(meter.peak)
            flop.append(dict(counter.by_dtype))
    return Rehearsal(*kept, *peaks, *flop)


def empty_part(learner, size):
    """What a step learns from, of `size` images."""
    side, clip = learner.active[-1], learner.clip
    text = clip.encode_text(torch.zeros(size, clip.text.context_length, dtype=torch.long))
    real = pyramid(torch.empty(size, 3, side, side), learner.active)
    wrong = torch.zeros(size, dtype=torch.long)
    z, other_z = torch.empty(2, size, learner.generator.config.z_dim)
    config, cut = learner.generator.config, learner.recipe.crop
    given = given_images(config, torch.empty(size, 3, side, side), input_noise(config, size, None))
    if cut:
        small = config.input_resolution
        real = {r: x[..., : r // small * cut, : r // small * cut] for r, x in real.items()}
        given = tuple(x[..., :cut, :cut] for x in given)
    return Part(real, text, wrong, z, other_z, torch.empty(size, 2, NUM_CHANCES), given)


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
    if spec == "train" or BUILT_IN.get(spec, Path(spec)).is_file():
        return new_small(MiniLM())
    name = spec.partition(":")[0]
    if name not in open_clip.list_models():
        raise UserError(f"--clip {spec}: --plan needs a model of open_clip, as ViT-L-14-quickgelu:openai, or emoji")
    return from_open_clip(open_clip.CLIP(**open_clip.get_model_config(name)), spec)


# ----------------------------------------------------------------------------------------------------------------------
# From two rehearsals to a run.


@dataclass
class Memory:
    """The bytes that a step takes at the peak, for any number of images: a part that is fixed, and one an image."""

    fixed: float
    an_image: float

    def of(self, images):
        return self.fixed + images * self.an_image

    def parts(self, share, available):
        """The fewest parts in which a rank's share of the batch fits into the memory there is. Raises UserError."""
        fits = (available - RESERVED - self.fixed) / self.an_image
        choices = (parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= fits)
        if (parts := next(choices, None)) is None:
            raise UserError(
                f"it does not fit: two images take {self.of(2) / 1e9:.0f} GB, and of {available / 1e9:.0f} GB "
                f"{RESERVED / 1e9:.0f} are left free; take a smaller preset or larger GPUs"
            )
        return parts


def estimate(preset, clip_model, dtype=torch.bfloat16, resolution=None):
    """Two rehearsals tell what depends on the batch → Memory, and the rehearsal of REHEARSED images."""
    batches = (2, REHEARSED)
    few, more = (rehearse(preset, clip_model, images, dtype, resolution=resolution) for images in batches)
    an_image = (more.peak_with_r1 - few.peak_with_r1) / (REHEARSED - 2)
    return Memory(few.peak_with_r1 - 2 * an_image, an_image), more


def of_an_image(rehearsal):
    """{dtype: FLOP} of an image of REHEARSED, a step with R1 counted as one in R1_INTERVAL."""
    plain, with_r1 = rehearsal.flop, rehearsal.flop_with_r1
    return {t: (plain.get(t, 0) + (n - plain.get(t, 0)) / R1_INTERVAL) / REHEARSED for t, n in with_r1.items()}


def plan(name, preset, clip_model, batch, gpus, hardware, workers):
    """The lines of `train.py --plan`: what a step takes, and a table for 1, 8, 64 and a given number of GPUs.

    Raises UserError where those cannot share the batch, or where a step does not fit.
    """
    if batch % (gpus or 1):
        raise UserError(f"--batch {batch} cannot be shared by --gpus {gpus}; choose a multiple")
    *lower, resolution = preset.generator.resolutions
    memory, rehearsal = estimate(preset, clip_model)
    in_parts = rehearse(preset, clip_model, REHEARSED, torch.bfloat16, parts=2)
    flop, accumulated = of_an_image(rehearsal), of_an_image(in_parts)
    yield f"{name} at {resolution}×{resolution} on {hardware.name}, global batch {batch}, CLIP {clip_model}"
    yield "  parameters, M:       " + figures(rehearsal.parameters, 1e6)
    yield "  memory kept, GB:     " + figures(rehearsal.state, 1e9)
    peak, an_image = memory.fixed / 1e9, memory.an_image / 1e9
    yield f"  memory at the peak:  {peak:.3g} GB, and {an_image:.3g} GB for each image of a part"
    by_dtype = {str(dtype).removeprefix("torch."): count for dtype, count in flop.items()}
    yield f"  work of an image:    {figures(by_dtype, 1e12)} TFLOP, R1 in one step of {R1_INTERVAL} included"
    heads = ("GPUs", "--accumulate", "memory, GB", "compute, s", "wire, GB", "wire, s", "data, s", "step, s", "days")
    yield "".join(f"{head:>{width}s}" for head, width in zip(heads, WIDTHS, strict=True)) + "   bound by"
    images = {}  # of a part, by the number of GPUs
    for number in sorted(n for n in {1, 8, 64, gpus or 1} if batch % n == 0):
        share = batch // number
        images[number] = share // memory.parts(share, hardware.memory)
        compute = share * hardware.seconds(flop if images[number] == share else accumulated)
        wire = 2 * (number - 1) / number * 4 * rehearsal.trained  # bytes of an all-reduce of the gradients
        seconds = {
            "compute": compute,
            "the wire": wire / (hardware.within_node if number <= 8 else hardware.between_nodes),
            "data": share / (DECODED * max(1, workers)),
        }
        parts, peak = share // images[number], memory.of(images[number])
        yield row_of_table(number, parts, peak, wire, seconds, preset.recipe.steps)
    of_phase = {r: estimate(preset, clip_model, resolution=r)[0] for r in lower} | {resolution: memory}
    for number, size in images.items():
        growing = {f"{r}×{r}": of_phase[r].of(size) for r in of_phase}
        yield f"  memory while growing, {number} GPUs, GB: {figures(growing, 1e9)}"
    yield f"{preset.recipe.steps:,} steps; compute, wire and data go on at the same time. Parameters, memory and FLOP"
    yield "are held against real steps on a CPU by tests/training/test_plan.py, compute by one run on an H200."
    rates = ", ".join(f"{UTILIZATION[t]:.0%} of {r / 1e12:g} TFLOP/s in {t}" for t, r in hardware.flop_rate.items())
    yield f"Taken: compute at {rates.replace('torch.', '')}. Guessed: {RESERVED / 1e9:.0f} GB of a GPU"
    yield f"are left free, and a worker reads {DECODED} pictures a second."


def print_plan(args, preset):
    """args: those of train.py. Raises UserError."""
    print("Going through steps with empty tensors; some minutes for a large preset …", flush=True)
    clip, batch = args.clip or preset.clip_model, args.batch or preset.recipe.batch
    for line in plan(args.preset, preset, clip, batch, args.gpus, HARDWARE[args.hardware], args.workers):
        print(line, flush=True)


def row_of_table(gpus, parts, memory, wire, seconds, steps):
    """memory, wire: bytes. seconds: of a step, by what takes them; they go on at the same time."""
    slowest = max(seconds, key=seconds.get)
    step = seconds[slowest]
    row = (gpus, parts, memory / 1e9, seconds["compute"], wire / 1e9, seconds["the wire"], seconds["data"], step)
    cells = (*row, steps * step / 86400)
    return "".join(f"{value:{width}.3g}" for value, width in zip(cells, WIDTHS, strict=True)) + f"   {slowest}"


def figures(numbers, unit):
    return ", ".join(f"{name} {number / unit:,.4g}" for name, number in numbers.items())


# ----------------------------------------------------------------------------------------------------------------------
# What a run on GPUs takes from the plan.


def auto_or_positive(text):
    """The type of --accumulate."""
    return text if text == "auto" else positive_int(text)


def choose_parts(accumulate, preset, batch, clip, device, dtype):
    """In how many parts a global batch is made, by --accumulate → the same number on all ranks.

    accumulate: "auto", as few as the memory allows at the highest resolution; or a number. Raises UserError where that
    does not fit, where the ranks cannot share the batch, or where a part would hold no wrong caption.
    """
    ranks = distributed.world_size()
    if batch % ranks:
        raise UserError(f"--batch {batch} cannot be shared by {ranks} ranks; choose a multiple")
    parts, fewest = 1 if accumulate == "auto" else accumulate, 1
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        with distributed.together():
            if distributed.is_main():
                with distributed.alone():
                    memory_needed, _ = estimate(preset, clip, dtype)
                fewest = memory_needed.parts(batch // ranks, memory)
        fewest = distributed.broadcast(fewest)
        if accumulate == "auto":
            parts = fewest
            say(
                f"--accumulate {parts}: parts of {batch // ranks // parts} images a GPU, by the plan at full resolution"
            )
    if parts < fewest:
        raise UserError(f"--accumulate {parts} does not fit into this GPU; take {fewest}, or auto")
    if batch // parts < 2:
        raise UserError(
            f"--batch {batch} in {parts} part(s) leaves no wrong caption to compare with; take 2 or more each"
        )
    if batch % (ranks * parts):
        raise UserError(f"--batch {batch} cannot be shared by {ranks} ranks in {parts} parts; choose a multiple")
    return parts
