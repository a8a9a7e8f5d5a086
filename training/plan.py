"""Computes what a run would take, without running it: memory, FLOP, bytes and time.

    python train.py --plan --preset aurora-64 --gpus 64

Runs steps on tensors that have shapes and no content, and counts what the steps allocate, multiply and move. Tests
compare the counts with formulas and with real steps. The time is the counts divided by the rates that a GPU reaches, a
share of its peak rates.
"""

import contextlib
import json
import weakref
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

import attention
from augment import NUM_CHANCES
from clip import BUILT_IN, MiniLM, from_open_clip, new_small
from common import distributed
from common.cli import UserError, positive_int
from common.disk import write_text
from common.distributed import say
from experts import Experts
from layers import pyramid
from losses import R1_INTERVAL
from presets import fitted_to
from sampling.latent import BATCH as DRAWN
from step import Learner, MicroBatch
from upsampler import draw_input_noise, given_images
from weights.efficientnet import load_efficientnet

# Measured on an H200, with micro-batches of 16 and before attention was fused: a mean step of aurora-64 took 1.38 s. It
# multiplied 76 TFLOP in bfloat16 and 8.5 TFLOP in float32, and moved 1.7 TB, at this share of the peak rates.
SHARE_OF_PEAK = 0.40
RESERVED = 10e9  # assumed: bytes for CUDA's context, NCCL's buffers and fragmentation
# Images of the counted steps: multiples of four, as some losses use every fourth. Others are on a line through these.
REHEARSED = 4, 8


class Hardware(NamedTuple):
    """A GPU's data sheet: FLOP a second in each dtype, bytes a second to and from memory, and bytes of memory. Float32
    is without TF32, as in train.py.
    """

    name: str
    bfloat16: float
    float32: float
    bandwidth: float
    memory: float

    def seconds(self, work):
        """The time of a step's products and traffic, one after the other."""
        products = work["bfloat16"] / self.bfloat16 + work["float32"] / self.float32
        return (products + work["moved"] / self.bandwidth) / SHARE_OF_PEAK


HARDWARE = {
    "a100": Hardware("A100 80 GB", 312e12, 19.5e12, 2.04e12, 80e9),
    "h100": Hardware("H100 80 GB", 989e12, 67e12, 3.35e12, 80e9),
}


# ----------------------------------------------------------------------------------------------------------------------
# Counting.

aten = torch.ops.aten


def convolution_backward(upstream, x, weight, *_, out_val, **__):
    """Each of the two gradients takes as much as the forward pass. PyTorch's formula is wrong for groups."""
    gradients = sum(gradient is not None for gradient in out_val[:2])
    return gradients * conv_flop_count(x.shape, weight.shape, upstream.shape)


FORMULAS = flop_registry | {
    aten.convolution_backward: convolution_backward,
    aten._euclidean_dist: lambda q, k, out_val: 2 * out_val.numel() * (q.shape[-1] + 2),  # with both norms
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class FlopCounter(TorchDispatchMode):
    """Counts FLOP with PyTorch's formulas, one corrected and three added, for each dtype of the factors.

    PyTorch's FlopCounterMode also counts for each module, and therefore fails in R1.
    """

    def __init__(self):
        super().__init__()
        self.by_dtype = Counter()

    @property
    def total(self):
        return self.by_dtype.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := FORMULAS.get(func._overloadpacket):
            dtype = next(leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
            self.by_dtype[dtype] += formula(*args, **(kwargs or {}), out_val=out)
        return out


class Meter(FlopCounter):
    """Counts FLOP, allocated bytes and their peak, and the bytes that operators read and write, for empty tensors.

    A point's expert depends on its content. Here each expert gets the same number of points, as with a perfect balance
    loss.
    """

    def __init__(self):
        super().__init__()
        self.alive = self.peak = self.moved = 0
        self.known = weakref.WeakSet()  # storages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.bincount.default:
            points, experts = args[0].numel(), [*args, *(kwargs or {}).values()][-1]  # the last argument is minlength
            with unset_fake_temporarily():
                ends = torch.arange(experts + 1) * points // experts
                return ends.diff()
        out = super().__torch_dispatch__(func, types, args, kwargs)
        inputs, outputs = ([x for x in tree_leaves(some) if isinstance(x, torch.Tensor)] for some in (args, out))
        if outputs and not func.is_view:
            self.moved += sum(x.numel() * x.element_size() for x in inputs + outputs)
        for storage in (x.untyped_storage() for x in outputs):
            if storage not in self.known:
                self.known.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.release, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def release(self, size):
        self.alive -= size

    def measure(self, call):
        """Calls the function → {"memory": the peak in bytes, "moved": in bytes, "bfloat16" and "float32": FLOP}."""
        self.by_dtype.clear()
        self.peak = self.moved = 0
        call()
        flop = {"bfloat16": self.by_dtype[torch.bfloat16], "float32": self.by_dtype[torch.float32]}
        return {"memory": self.peak, "moved": self.moved, **flop}


# ----------------------------------------------------------------------------------------------------------------------
# Costs of a step.


class Rehearsal:
    """The costs of one rank at the highest resolution. parameters: numbers; kept: bytes that stay from step to step.

    counts: for each number of REHEARSED images, {kind: what Meter.measure counts}. The kinds: "step", all except R1;
    "r1", which comes first; "drawing", the generator's forward pass, which micro-batches repeat; "evaluation", the
    moving average's images and their CLIP features.

    preset: a presets.Preset. In bfloat16 attention costs what it costs on a GPU, otherwise what it costs on this CPU.
    """

    def __init__(self, preset, clip_model, dtype=torch.bfloat16):
        with distributed.alone(), as_on_gpu(dtype), FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
            clip = clip_without_weights(clip_model)
            preset = fitted_to(preset, clip.width, clip.map_shapes())
            perceptual = None
            if preset.recipe.perceptual_weight:
                perceptual = load_efficientnet(features_only=True, with_weights=False)
            learner = Learner(preset, clip, torch.device("cpu"), dtype, 1, perceptual)
            self.parameters, self.kept = parameters_and_memory(learner)
            learner.step(1, [empty_batch(learner, 2)])  # makes the gradients and Adam's averages
            self.counts = [count(learner, meter, images) for images in REHEARSED]

    def of(self, kind, images):
        """The counts for any number of images."""
        few, many = (counts[kind] for counts in self.counts)
        share = (images - REHEARSED[0]) / (REHEARSED[1] - REHEARSED[0])
        return {name: (1 - share) * few[name] + share * many[name] for name in many}

    def memory(self, images, r1_images):
        """The bytes at the peak."""
        sizes = {"step": images, "r1": r1_images, "evaluation": DRAWN}
        return max(self.of(kind, size)["memory"] for kind, size in sizes.items())

    def most_images(self, kind, total, available):
        """The largest divisor of `total` whose images fit into the available bytes; 0 if none does."""
        for images in range(total, 0, -1):
            if total % images == 0 and self.of(kind, images)["memory"] <= available - RESERVED:
                return images
        return 0

    def divide(self, share, available):
        """A rank's share of the batch, in images → the fewest micro-batches that fit, and the images of R1 at a time.

        Raises UserError if one image, or an evaluation, does not fit.
        """
        images = self.most_images("step", share, available)
        r1_images = self.most_images("r1", images, available)
        if not r1_images or self.of("evaluation", DRAWN)["memory"] > available - RESERVED:
            raise UserError(
                f"it does not fit: one image takes {self.memory(1, 1) / 1e9:.0f} GB, and of {available / 1e9:.0f} GB "
                f"{RESERVED / 1e9:.0f} are left free; take a smaller preset or larger GPUs"
            )
        return share // images, r1_images

    def work(self, share, micro_batches):
        """The counts of a mean step for a rank's share of the batch; R1 is in one step of R1_INTERVAL."""
        work = Counter()
        for kind, times in (("step", 1), ("r1", 1 / R1_INTERVAL), ("drawing", int(micro_batches > 1))):
            for name, number in self.of(kind, share // micro_batches).items():
                work[name] += micro_batches * times * number
        return work


@contextlib.contextmanager
def as_on_gpu(dtype):
    """A context in which attention in bfloat16 is fused and CLIP's blocks are not fused."""
    fast, fused_on = torch.backends.mha.get_fastpath_enabled(), attention.FUSED_ON
    torch.backends.mha.set_fastpath_enabled(False)
    if dtype == torch.bfloat16:
        attention.FUSED_ON = {"cuda", "cpu"}
    try:
        yield
    finally:
        attention.FUSED_ON = fused_on
        torch.backends.mha.set_fastpath_enabled(fast)


def count(learner, meter, images):
    """→ {kind: what a Meter counts}, see Rehearsal."""
    learner.r1_images = images
    step = meter.measure(lambda: learner.step(1, [empty_batch(learner, images)]))  # includes reading the captions
    batch = empty_batch(learner, images)
    r1 = meter.measure(lambda: learner.penalize([batch], R1_INTERVAL))
    with torch.no_grad():
        drawing = meter.measure(lambda: learner.draw(batch))
        inputs = *batch.given, batch.z, batch.text.tokens, batch.text.eot
        evaluation = meter.measure(lambda: learner.clip.encode_image(learner.ema(*inputs).image))
    return {"step": step, "r1": r1, "drawing": drawing, "evaluation": evaluation}


def empty_batch(learner, size):
    """A MicroBatch of `size` images, without content."""
    side, clip, config = learner.active[-1], learner.clip, learner.generator.config
    text = clip.encode_text(torch.zeros(size, clip.text.context_length, dtype=torch.long))
    images, wrong = torch.empty(size, 3, side, side), torch.zeros(size, dtype=torch.long)
    real, given = pyramid(images, learner.active), given_images(config, images, draw_input_noise(config, size, None))
    if side := learner.recipe.crop:  # upsampler.crop would have to read where, and these tensors have no content
        sides = {r: r * side // config.input_resolution for r in real}
        real = {r: x[..., : sides[r], : sides[r]] for r, x in real.items()}
        given = tuple(x[..., :side, :side] for x in given)
    z, chances = torch.empty(size, config.z_dim), torch.empty(size, 2, NUM_CHANCES)
    return MicroBatch(real, text, wrong, z, chances, given)


def parameters_and_memory(learner):
    """→ {network: number of parameters}, and {what: its bytes}. All parameters learn in float32."""
    experts = [module for module in learner.generator.modules() if isinstance(module, Experts)]
    networks = {"generator": learner.generator, "its experts": nn.ModuleList(experts)}
    networks |= {"discriminator": learner.discriminator, "frozen CLIP": learner.clip}
    numbers = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    learning = numbers["generator"] + numbers["discriminator"]
    kept = {"networks": 4 * learning, "gradients at most": 4 * learning, "Adam": 8 * learning}
    kept["moving average"] = 4 * numbers["generator"]
    kept["CLIP"] = sum(p.numel() * p.element_size() for p in learner.clip.parameters())
    return numbers, kept


def clip_without_weights(spec):
    """The CLIP of a preset or of --clip, with its shapes and without weights. Raises UserError."""
    if spec == "train" or BUILT_IN.get(spec, Path(spec)).is_file():
        return new_small(MiniLM())
    name = spec.partition(":")[0]
    if name not in open_clip.list_models():
        raise UserError(
            f"--clip {spec}: --plan needs emoji or a model of open_clip, for example ViT-L-14-quickgelu:openai"
        )
    return from_open_clip(open_clip.CLIP(**open_clip.get_model_config(name)), spec)


# ----------------------------------------------------------------------------------------------------------------------
# train.py --plan.


def print_plan(args, preset):
    """Prints the plan. args: of train.py. Raises UserError."""
    print("Running steps with empty tensors; this takes minutes for a large preset …", flush=True)
    recipe, clip = preset.recipe, args.clip or preset.clip_model
    batch, steps = args.batch or recipe.batch, args.steps or recipe.steps
    if batch % (args.gpus or 1):
        raise UserError(f"--batch {batch} cannot be shared by --gpus {args.gpus}; choose a multiple")
    hardware, rehearsal = HARDWARE[args.hardware or "a100"], Rehearsal(preset, clip)
    print(f"{args.preset} on {hardware.name}, global batch {batch}, CLIP {clip}. Counted, with shapes alone:")
    print("  parameters, M:           " + figures(rehearsal.parameters, 1e6))
    print("  memory, GB:              " + figures(rehearsal.kept, 1e9))
    for kind in ("step", "r1", "evaluation"):
        none, one = (rehearsal.of(kind, images)["memory"] / 1e9 for images in (0, 1))
        print(f"  peak of {kind + ', GB:':16s} {none:.3g} + {one - none:.3g} for each image")
    work = rehearsal.work(32, 1)
    bfloat16, float32, moved = (work[name] / 1e12 for name in ("bfloat16", "float32", "moved"))
    print(f"  mean step on 32 images:  {bfloat16:.4g} TFLOP in bfloat16, {float32:.4g} in float32, ", end="")
    print(f"{moved:.4g} TB of memory traffic; every {R1_INTERVAL}th step has R1")
    names = "GPUs", "--accumulate", "images per batch", "images per R1 batch", "memory, GB", "a step, s", "days"
    print("".join(f"{name:>{len(name) + 6}s}" for name in names))
    for gpus in sorted(n for n in {1, 8, 64, args.gpus or 1} if batch % n == 0):
        micro_batches, r1_images = rehearsal.divide(batch // gpus, hardware.memory)
        images = batch // gpus // micro_batches
        memory = rehearsal.memory(images, r1_images) / 1e9
        seconds = hardware.seconds(rehearsal.work(batch // gpus, micro_batches))
        evaluated = recipe.fid_samples * batch / recipe.fid_every / gpus  # images a step, on average
        seconds += evaluated / DRAWN * hardware.seconds(rehearsal.of("evaluation", DRAWN))
        row = gpus, micro_batches, images, r1_images, memory, seconds, steps * seconds / 86400
        print("".join(f"{float(f'{value:.3g}'):{len(name) + 6},g}" for name, value in zip(names, row, strict=True)))
    factor = 1 / SHARE_OF_PEAK
    peak = (work["bfloat16"] + work["float32"]) / hardware.bfloat16 / hardware.seconds(work)
    print(
        f"The ideal time of a step is that of its matrix products plus that of its memory traffic, at the peak rates.\n"
        f"On one H200, a step of an earlier version took {factor:.1f} times its ideal time.\n"
        f"Assumed: with this version on {hardware.name}, a step also takes {factor:.1f} times its ideal time.\n"
        f"That is {peak:.1%} of the bfloat16 peak.\n"
        f"{RESERVED / 1e9:.0f} GB are left free. Checkpoints cost no time. Not counted: waiting for data or other GPUs."
    )


def figures(numbers, unit):
    return ", ".join(f"{name} {number / unit:,.4g}" for name, number in numbers.items())


# ----------------------------------------------------------------------------------------------------------------------
# Micro-batches of a run.


def auto_or_positive(text):
    """The type of --accumulate."""
    return text if text == "auto" else positive_int(text)


def choose_micro_batches(accumulate, preset, batch, clip, device, dtype, path):
    """→ the number of micro-batches in a global batch, and of R1's images at a time (None: all); the same on all ranks.

    accumulate: a number, or "auto": the fewest that fit into a GPU's memory at the highest resolution. path: the file
    that keeps the plan, which takes minutes. Raises UserError if they do not fit, if the ranks cannot share the batch,
    or if a micro-batch is too small to contain a wrong caption.
    """
    ranks = distributed.world_size()
    if batch % ranks:
        raise UserError(f"--batch {batch} cannot be shared by {ranks} ranks; choose a multiple")
    number, fewest, r1_images = 1 if accumulate == "auto" else accumulate, 1, None
    if device.type == "cuda":
        with distributed.together():
            plan = kept_division(path, preset, clip, dtype, batch // ranks, device) if distributed.is_main() else None
        fewest, r1_images = distributed.broadcast(plan)
        if accumulate == "auto":
            number = fewest
            sizes = f"micro-batches of {batch // ranks // number} images a GPU, R1 of {r1_images} at a time"
            say(f"--accumulate {number}: {sizes}, by the plan at full resolution")
    if number < fewest:
        raise UserError(f"--accumulate {number} does not fit into this GPU; take {fewest}, or auto")
    if batch // number < 2:
        raise UserError(
            f"--batch {batch} in {number} part(s) leaves no wrong caption to compare with; take 2 or more each"
        )
    if batch % (ranks * number * preset.discriminator.group):
        raise UserError(
            f"--batch {batch} cannot be shared by {ranks} ranks in {number} parts, of groups of "
            f"{preset.discriminator.group} images; choose a multiple of {ranks * number * preset.discriminator.group}"
        )
    return number, r1_images


def kept_division(path, preset, clip, dtype, share, device):
    """Rehearsal.divide for a device. Reads it from the file `path`, or computes it and writes it there."""
    memory = torch.cuda.get_device_properties(device).total_memory
    asked = repr((preset, clip, dtype, share, memory, torch.__version__))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_text("utf-8"))
        if kept["asked"] == asked:
            return kept["division"]
    division = Rehearsal(preset, clip, dtype).divide(share, memory)
    with contextlib.suppress(OSError):  # the run reports it when it writes to the folder
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"asked": asked, "division": division}))
    return division
