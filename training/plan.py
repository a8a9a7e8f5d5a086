"""Computes what a run would take, without running it: memory, FLOP, memory traffic and time.

    python train.py --plan --preset aurora-64

Runs steps on tensors that have shapes and no content, and counts what the steps allocate, multiply and move. Tests
compare the counts with formulas and with real steps. The time is the counts divided by the rates that a GPU reaches, a
share of its peak rates.
"""

import warnings
import weakref
from collections import Counter
from pathlib import Path

import open_clip
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

import attention
from augment import NUM_CHANCES
from clip import BUILT_IN, MiniLM, from_open_clip, new_small
from common.cli import UserError
from layers import pyramid
from losses import R1_INTERVAL
from step import Learner, MicroBatch
from upsampler import draw_input_noise, given_images
from weights.efficientnet import load_efficientnet

# The data sheet of an A100 with 80 GB: bytes; FLOP a second, in float32 without TF32; bytes moved a second.
MEMORY = 80e9
PEAK = {"bfloat16": 312e12, "float32": 19.5e12, "moved": 2.04e12}
# Measured on an H200, with micro-batches of 16 and before attention was fused: a mean step of aurora-64 took 1.38 s. It
# multiplied 76 TFLOP in bfloat16 and 8.5 TFLOP in float32, and moved 1.7 TB, at this share of the peak rates.
SHARE_OF_PEAK = 0.40
RESERVED = 10e9  # assumed: bytes for CUDA's context, NCCL's buffers and fragmentation
# Images of the counted steps. Others are on a line through these. CLIP may see every fourth of the lower images, so
# these are multiples of four.
REHEARSED = 4, 8
GPUS = 1, 8, 64
COLUMNS = "GPUs|--accumulate|images|memory, GB|bf16, TFLOP|fp32, TFLOP|traffic, TB|a step, s|days"

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


class Rehearsal:
    """The costs of one rank at the highest resolution of a presets.Preset.

    counts: for each number of REHEARSED images, {kind: what Meter.measure counts}. The kinds: "step", all except R1;
    "r1", which comes first; "drawing", the generator's forward pass, which micro-batches repeat.
    """

    def __init__(self, preset, clip_model, dtype=torch.bfloat16):
        with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
            clip = clip_without_weights(clip_model)
            perceptual = load_efficientnet(features_only=True) if preset.recipe.perceptual_weight else None
            learner = Learner(preset, clip, torch.device("cpu"), dtype, 1, perceptual)
            learner.step(1, [empty_batch(learner, REHEARSED[0])])  # makes the gradients and Adam's averages
            self.counts = [count(learner, meter, images) for images in REHEARSED]

    def of(self, kind, images):
        """The counts for any number of images."""
        few, many = (counts[kind] for counts in self.counts)
        share = (images - REHEARSED[0]) / (REHEARSED[1] - REHEARSED[0])
        return {name: (1 - share) * few[name] + share * many[name] for name in many}

    def memory(self, images):
        """The bytes at the peak of a step with R1 on a micro-batch of so many images."""
        return max(self.of(kind, images)["memory"] for kind in ("step", "r1"))

    def fewest_micro_batches(self, share, group=1):
        """A rank's share of the batch, in images → the fewest equal parts of whole groups that fit into MEMORY. Raises
        UserError if one group does not fit.
        """
        for number in range(1, share // group + 1):
            if share % (number * group) == 0 and self.memory(share // number) <= MEMORY - RESERVED:
                return number
        needed = self.memory(group) / 1e9
        raise UserError(f"{group} image(s) take {needed:.0f} GB, which does not fit; take a smaller preset")

    def work(self, share, micro_batches):
        """The counts of a mean step for a rank's share of the batch; R1 is in one step of R1_INTERVAL."""
        work = Counter()
        for kind, times in (("step", 1), ("r1", 1 / R1_INTERVAL), ("drawing", int(micro_batches > 1))):
            for name, number in self.of(kind, share // micro_batches).items():
                work[name] += micro_batches * times * number
        return work


def seconds(work):
    """The time of a step's matrix products, then of its memory traffic."""
    return sum(work[name] / rate for name, rate in PEAK.items()) / SHARE_OF_PEAK


def count(learner, meter, images):
    """→ {kind: what a Meter counts}, see Rehearsal."""
    step = meter.measure(lambda: learner.step(1, [empty_batch(learner, images)]))  # includes reading the captions
    batch = empty_batch(learner, images)
    r1 = meter.measure(lambda: learner.penalize([batch], R1_INTERVAL))
    with torch.no_grad():
        drawing = meter.measure(lambda: learner.draw(batch))
    return {"step": step, "r1": r1, "drawing": drawing}


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


def clip_without_weights(spec):
    """The CLIP of a preset or of --clip, with its shapes and without weights. Raises UserError."""
    if spec == "train" or BUILT_IN.get(spec, Path(spec)).is_file():
        with warnings.catch_warnings(action="ignore"):  # nn.TransformerEncoder copies its layer, which has no content
            return new_small(MiniLM())
    try:
        model = open_clip.CLIP(**open_clip.get_model_config(spec.partition(":")[0]))
    except Exception as error:  # there is no such model, or it has another architecture, and open_clip raises anything
        raise UserError(
            f"--clip {spec}: --plan needs emoji or a CLIP of open_clip, for example ViT-L-14-quickgelu:openai"
        ) from error
    return from_open_clip(model, spec)


def count_as_on_gpu():
    """From now on attention is fused also on the CPU, and CLIP's blocks are not."""
    attention.FUSED_ON.add("cpu")
    torch.backends.mha.set_fastpath_enabled(False)


def print_plan(args, preset):
    """Prints the plan. args: of train.py. Raises UserError."""
    print("Running steps with empty tensors; this takes minutes for a large preset …", flush=True)
    clip, batch = args.clip or preset.clip_model, args.batch or preset.recipe.batch
    steps, group = args.steps or preset.recipe.steps, preset.discriminator.group
    count_as_on_gpu()
    rehearsal = Rehearsal(preset, clip)
    print(f"{args.preset} on A100 GPUs with 80 GB, global batch {batch}, {steps:,} steps, CLIP {clip}")
    print("".join(f"{name:>13s}" for name in COLUMNS.split("|")))
    for gpus in GPUS:
        if batch % (gpus * group):
            continue
        share = batch // gpus
        micro_batches = rehearsal.fewest_micro_batches(share, group)
        images, work = share // micro_batches, rehearsal.work(share, micro_batches)
        memory, tera = rehearsal.memory(images) / 1e9, [work[name] / 1e12 for name in PEAK]
        days = steps * seconds(work) / 86400
        row = gpus, micro_batches, images, memory, *tera, seconds(work), days
        print("".join(f"{float(f'{value:.3g}'):13,g}" for value in row))
    print(
        "images: those of a GPU at a time. TFLOP, TB and s: of one GPU in a mean step. A step takes "
        f"{1 / SHARE_OF_PEAK:.1f} times as long as its\nmatrix products and its memory traffic at the peak rates, as "
        f"measured on one H200 with an earlier version. {RESERVED / 1e9:.0f} GB are\nleft free. Not counted: "
        "evaluations, checkpoints, waiting for data or for other GPUs."
    )
