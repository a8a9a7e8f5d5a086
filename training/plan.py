"""What a run would take, computed without running it: memory, FLOP, bytes, and so its time.

    python train.py --plan --preset aurora-64 --gpus 64

Steps are gone through with tensors that have shapes and no content. What they allocate, multiply and move is counted;
tests hold that against formulas and real steps. Seconds are those counts at the peak rates of a GPU, divided by the
share of them that is reached.
"""

import contextlib
import json
import weakref
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import attention
from augment import NUM_CHANCES
from clip import BUILT_IN, MiniLM, from_open_clip, new_small
from common import distributed
from common.cli import UserError, positive_int
from common.disk import atomically
from common.distributed import say
from layers import pyramid
from losses import R1_INTERVAL
from presets import fitted_to
from sampling.latent import BATCH as DRAWN
from step import Learner, MicroBatch
from upsampler import crop, draw_input_noise, given_images
from weights.perceptual import perceptual_network

# Measured: steps of aurora-64 on an H200, in micro-batches of 16 and before attention was fused, took 1.38 s on
# average. They multiplied 76 TFLOP in bfloat16 and 8.5 in float32, and moved 1.7 TB; at the peak rates that is this
# share of it.
SHARE_OF_PEAK = 0.40
# Assumed: the bytes to leave for CUDA's context, NCCL's buffers and fragmentation, the pictures of 256×256 that a data
# worker reads in a second, and the bytes that go to the CPU's memory in one, for a thread to write them.
RESERVED, DECODED, COPIED = 10e9, 300, 20e9
REHEARSED = 2, 4  # images of rehearsed steps; other numbers are on a line through them
COLUMNS = "GPUs", "--accumulate", "R1 of", "memory, GB", "compute, s", "wire, s", "data, s", "between, s", "days"


class Hardware(NamedTuple):
    """A GPU by its maker's data sheet, a second: FLOP, and bytes of its memory, and of an all-reduce within a node of 8
    GPUs and between nodes. Float32 is without TF32, as train.py asks for.
    """

    name: str
    bfloat16: float
    float32: float
    bandwidth: float
    memory: float
    within_node: float
    between_nodes: float

    def seconds(self, work):
        """The time of products and traffic, one after the other."""
        products = work["bfloat16"] / self.bfloat16 + work["float32"] / self.float32
        return (products + work["moved"] / self.bandwidth) / SHARE_OF_PEAK


HARDWARE = {
    "a100": Hardware("A100 80 GB", 312e12, 19.5e12, 2.04e12, 80e9, 300e9, 25e9),
    "h100": Hardware("H100 80 GB", 989e12, 67e12, 3.35e12, 80e9, 450e9, 50e9),
}


# ----------------------------------------------------------------------------------------------------------------------
# Counting.

aten = torch.ops.aten


def convolution_backward(upstream, x, weight, *_, out_val, **__):
    """Either gradient takes the products of the forward pass; PyTorch's formula counts the groups once too often."""
    wanted = sum(gradient is not None for gradient in out_val[:2])
    return wanted * conv_flop_count(x.shape, weight.shape, upstream.shape)


def attention_on_cpu(q, k, v, *_, **__):
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def attention_on_cpu_backward(upstream, q, k, v, *_, **__):
    return sdpa_backward_flop_count(upstream.shape, q.shape, k.shape, v.shape)


FORMULAS = flop_registry | {
    aten.convolution_backward: convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: attention_on_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_on_cpu_backward,
}


class FlopCounter(TorchDispatchMode):
    """Adds up PyTorch's formulas, one corrected and two added, by the dtype of what is multiplied.

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
        if formula := FORMULAS.get(func._overloadpacket):
            dtype = next(leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
            self.by_dtype[dtype] += formula(*args, **(kwargs or {}), out_val=out)
        return out


class Meter(TorchDispatchMode):
    """Of a step with empty tensors: the bytes alive and the most there were, those that operators read and write, and
    the number of operators.

    Which expert takes a point depends on its content. The points are spread evenly, as the balance loss wants them.
    """

    def __init__(self):
        super().__init__()
        self.alive, self.sizes, self.counts = 0, weakref.WeakKeyDictionary(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.bincount.default:
            return evenly(args[0].numel(), [*args, *kwargs.values()][-1])  # minlength is last
        out = func(*args, **kwargs)
        inputs, outputs = ([x for x in tree_leaves(some) if isinstance(x, torch.Tensor)] for some in (args, out))
        if outputs and not func.is_view:
            self.counts["moved"] += sum(x.numel() * x.element_size() for x in inputs + outputs)
            self.counts["operators"] += 1
        for storage in (x.untyped_storage() for x in outputs):
            if storage not in self.sizes:
                self.sizes[storage] = storage.nbytes()
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.release, storage.nbytes())
        self.counts["memory"] = max(self.counts["memory"], self.alive)
        return out

    def release(self, size):
        self.alive -= size

    def measure(self, call, *arguments):
        """→ all that is counted while it is called."""
        self.counts.clear()
        with FlopCounter() as counter:
            call(*arguments)
        return self.counts | Counter({str(t).removeprefix("torch."): flop for t, flop in counter.by_dtype.items()})


def evenly(points, experts):
    """How many points each expert takes, [E]; a tensor with content."""
    with unset_fake_temporarily():
        ends = torch.arange(experts + 1) * points // experts
        return ends.diff()


class Counted:
    """What is counted of any number of images, on a line through that of REHEARSED ones."""

    def __init__(self, few, more):
        self.few, self.more = few, more

    def of(self, images):
        share = (images - REHEARSED[0]) / (REHEARSED[1] - REHEARSED[0])
        return Counter({name: (1 - share) * self.few[name] + share * self.more[name] for name in self.more})

    def fitting(self, available):
        """How many images fit into so many bytes."""
        first, second = self.of(0)["memory"], self.of(1)["memory"]
        return (available - RESERVED - first) / (second - first)


# ----------------------------------------------------------------------------------------------------------------------
# A rehearsal.


class Rehearsal:
    """What one rank takes at the highest resolution. step: all but R1, captions included; r1: R1 alone, which comes
    first; drawing: the generator's forward pass alone, which micro-batches take once more; evaluation: the moving
    average, as CLIP sees it. parameters: numbers; state: the bytes kept from step to step.

    preset: a presets.Preset. In bfloat16 attention is counted as a GPU computes it, else as this CPU.
    """

    def __init__(self, preset, clip_model, dtype=torch.bfloat16):
        with distributed.alone(), as_on_gpu(dtype), FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
            clip = clip_without_weights(clip_model)
            preset = fitted_to(preset, clip.width, clip.map_shapes)
            perceptual = perceptual_network(preset.recipe, with_weights=False)
            learner = Learner(preset, clip, torch.device("cpu"), dtype, 1, perceptual)
            self.parameters, self.state = parameters_and_state(learner)
            for network, optimizer in (
                (learner.generator, learner.optimizer_g),
                (learner.discriminator, learner.optimizer_d),
            ):
                for parameter in network.parameters():
                    parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
                optimizer.step()  # makes Adam's averages
            few, more = (count(learner, meter, images) for images in REHEARSED)
        self.step, self.r1, self.drawing, self.evaluation = map(Counted, few, more)

    def memory(self, images, r1_images):
        """The bytes at the peak."""
        kinds = self.step.of(images), self.r1.of(r1_images), self.evaluation.of(DRAWN)
        return max(counts["memory"] for counts in kinds)

    def divide(self, share, available):
        """A rank's share of the batch → the fewest micro-batches that fit, and how many images R1 takes at a time.

        Raises UserError where one image, or an evaluation, does not fit.
        """
        images = largest_divisor(share, self.step.fitting(available))
        r1_images = largest_divisor(images, self.r1.fitting(available))
        if not r1_images or self.evaluation.fitting(available) < DRAWN:
            raise UserError(
                f"it does not fit: one image takes {self.memory(1, 1) / 1e9:.0f} GB, and of {available / 1e9:.0f} GB "
                f"{RESERVED / 1e9:.0f} are left free; take a smaller preset or larger GPUs"
            )
        return share // images, r1_images

    def work(self, share, micro_batches):
        """What is counted of a step for a rank's share in so many micro-batches, R1 as one step of R1_INTERVAL."""
        work = Counter()
        for counted, times in ((self.step, 1), (self.r1, 1 / R1_INTERVAL), (self.drawing, int(micro_batches > 1))):
            one = counted.of(share // micro_batches)
            work.update({name: micro_batches * times * number for name, number in one.items()})
        return work


@contextlib.contextmanager
def as_on_gpu(dtype):
    """A context in which attention is fused, if in bfloat16, and CLIP's blocks are not one operator."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    fused_on = {"cuda", "cpu"} if dtype == torch.bfloat16 else {"cuda"}
    former, attention.FUSED_ON = attention.FUSED_ON, fused_on
    try:
        yield
    finally:
        attention.FUSED_ON = former
        torch.backends.mha.set_fastpath_enabled(fast)


def count(learner, meter, images):
    """→ what is counted of a step, R1, a drawing and an evaluation of so many images."""
    learner.r1_images = images
    step = meter.measure(lambda: learner.step(1, [empty_batch(learner, images)]))  # reads the captions first
    batch = empty_batch(learner, images)
    inputs = *batch.given, batch.z, batch.text.tokens, batch.text.eot, learner.active[-1]
    r1 = meter.measure(learner.penalize, [batch], R1_INTERVAL)
    with torch.no_grad():
        drawing = meter.measure(learner.draw, batch, batch.z, learner.active[-1])
        evaluation = meter.measure(lambda: learner.clip.encode_image(learner.ema(*inputs).image))
    return step, r1, drawing, evaluation


def empty_batch(learner, size):
    """What a step learns from, of so many images."""
    side, clip, config = learner.active[-1], learner.clip, learner.generator.config
    text = clip.encode_text(torch.zeros(size, clip.text.context_length, dtype=torch.long))
    images, wrong = torch.empty(size, 3, side, side), torch.zeros(size, dtype=torch.long)
    real, given = pyramid(images, learner.active), given_images(config, images, draw_input_noise(config, size, None))
    if learner.recipe.crop:
        cut = config.input_resolution, learner.recipe.crop, torch.zeros(size, 2)
        real = {r: crop(x, *cut) for r, x in real.items()}
        given = tuple(crop(x, *cut) for x in given)
    return MicroBatch(real, text, wrong, *torch.empty(2, size, config.z_dim), torch.empty(size, 2, NUM_CHANCES), given)


def largest_divisor(number, limit):
    """The largest divisor of a number that is not above the limit; 0 if there is none."""
    return max((d for d in range(1, number + 1) if number % d == 0 and d <= limit), default=0)


def parameters_and_state(learner):
    """→ numbers of parameters, and the bytes kept from step to step, by what they are of."""
    networks = {"generator": learner.generator, "discriminator": learner.discriminator, "frozen CLIP": learner.clip}
    parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    both = [*learner.generator.named_parameters(), *learner.discriminator.named_parameters()]
    parameters["experts"] = sum(p.numel() for name, p in both if ".experts." in name)
    parameters["learning"] = sum(p.numel() for _, p in both if p.requires_grad)
    state = {
        "networks": 4 * (parameters["generator"] + parameters["discriminator"]),
        "gradients": 4 * parameters["learning"],
        "Adam": 8 * parameters["learning"],
        "moving average": 4 * parameters["generator"],
        "CLIP": sum(p.numel() * p.element_size() for p in learner.clip.parameters()),
    }
    return parameters, state


def clip_without_weights(spec):
    """The CLIP of a preset or of --clip, by its sizes alone."""
    if spec == "train" or BUILT_IN.get(spec, Path(spec)).is_file():
        return new_small(MiniLM())
    name = spec.partition(":")[0]
    if name not in open_clip.list_models():
        raise UserError(f"--clip {spec}: --plan needs a model of open_clip, as ViT-L-14-quickgelu:openai, or emoji")
    return from_open_clip(open_clip.CLIP(**open_clip.get_model_config(name)), spec)


# ----------------------------------------------------------------------------------------------------------------------
# train.py --plan.


def print_plan(args, preset):
    """args: those of train.py. Raises UserError."""
    print("Going through steps with empty tensors; some minutes for a large preset …", flush=True)
    clip, batch = args.clip or preset.clip_model, args.batch or preset.recipe.batch
    if batch % (args.gpus or 1):
        raise UserError(f"--batch {batch} cannot be shared by --gpus {args.gpus}; choose a multiple")
    hardware, rehearsal = HARDWARE[args.hardware], Rehearsal(preset, clip)
    print(f"{args.preset} on {hardware.name}, global batch {batch}, CLIP {clip}. Counted, with shapes alone:")
    print("  parameters, M:       " + figures(rehearsal.parameters, 1e6))
    print("  memory kept, GB:     " + figures(rehearsal.state, 1e9))
    for kind in ("step", "r1", "evaluation"):
        none, one = (getattr(rehearsal, kind).of(images)["memory"] / 1e9 for images in (0, 1))
        print(f"  peak of {kind + ',':12s} GB: {none:.3g}, and {one - none:.3g} an image")
    work = rehearsal.work(32, 1)
    counts = {name: work[name] for name in ("bfloat16", "float32", "moved")}
    print("  mean step on 32 images, with R1 in every 16th, TFLOP and TB: " + figures(counts, 1e12))
    print(f"  operators of a micro-batch: {rehearsal.step.few['operators']:,}")
    print("".join(f"{name:>13s}" for name in COLUMNS))
    for number in sorted(n for n in {1, 8, 64, args.gpus or 1} if batch % n == 0):
        cells = row(rehearsal, preset.recipe, batch, number, hardware, args)
        print("".join(f"{value:13.3g}" for value in cells))
    peak = (work["bfloat16"] + work["float32"]) / hardware.bfloat16 / hardware.seconds(work)
    print(
        "Compute, wire and data go on at the same time, evaluations and checkpoints between. Measured, on one H200:\n"
        f"{SHARE_OF_PEAK:.0%} of the speed that the peak rates of products and memory allow; for this preset that is\n"
        f"{peak:.1%} of the bfloat16 peak. Assumed: {SHARE_OF_PEAK:.0%} for all; {RESERVED / 1e9:.0f} GB of a GPU\n"
        f"left free; {DECODED} pictures a second by each data worker; {COPIED / 1e9:.0f} GB/s to the CPU."
    )


def figures(numbers, unit):
    return ", ".join(f"{name} {number / unit:,.4g}" for name, number in numbers.items())


def row(rehearsal, recipe, batch, gpus, hardware, args):
    """One row of the table. Seconds are of a step."""
    share = batch // gpus
    micro_batches, r1_images = rehearsal.divide(share, hardware.memory)
    compute = hardware.seconds(rehearsal.work(share, micro_batches))
    wire = 2 * (gpus - 1) / gpus * 4 * rehearsal.parameters["learning"]  # bytes of an all-reduce of the gradients
    wire /= hardware.within_node if gpus <= 8 else hardware.between_nodes
    data = share / (DECODED * max(1, args.workers))
    drawn = recipe.fid_samples / gpus * batch / recipe.fid_every  # images that a step's share of an evaluation draws
    kept = rehearsal.state
    saved = (kept["networks"] + kept["Adam"] / 2 + kept["moving average"]) / args.save_every
    between = hardware.seconds(rehearsal.evaluation.of(drawn)) + saved / COPIED
    days = (args.steps or recipe.steps) * (max(compute, wire, data) + between) / 86400
    memory = rehearsal.memory(share // micro_batches, r1_images) / 1e9
    return gpus, micro_batches, r1_images, memory, compute, wire, data, between, days


# ----------------------------------------------------------------------------------------------------------------------
# What a run on GPUs takes from the plan.


def auto_or_positive(text):
    """The type of --accumulate."""
    return text if text == "auto" else positive_int(text)


def choose_micro_batches(accumulate, preset, batch, clip, device, dtype, path):
    """→ how many micro-batches a global batch is made of, and how many images R1 takes at a time, None for all; on all
    ranks.

    accumulate: "auto", as few as the memory allows at the highest resolution; or a number. path: the file that keeps
    what was found, which takes minutes. Raises UserError where that does not fit, where the ranks cannot share the
    batch, or where a micro-batch would hold no wrong caption.
    """
    ranks = distributed.world_size()
    if batch % ranks:
        raise UserError(f"--batch {batch} cannot be shared by {ranks} ranks; choose a multiple")
    number, fewest, r1_images = 1 if accumulate == "auto" else accumulate, 1, None
    if device.type == "cuda":
        with distributed.together():
            found = kept_division(path, preset, clip, dtype, batch // ranks, device) if distributed.is_main() else None
        fewest, r1_images = distributed.broadcast(found)
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
    if batch % (ranks * number):
        raise UserError(f"--batch {batch} cannot be shared by {ranks} ranks in {number} parts; choose a multiple")
    return number, r1_images


def kept_division(path, preset, clip, dtype, share, device):
    """Rehearsal.divide for a device, from the file `path`, or else written there."""
    memory = torch.cuda.get_device_properties(device).total_memory
    asked = repr((preset, clip, dtype, share, memory, torch.__version__))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_text("utf-8"))
        if kept["asked"] == asked:
            return kept["division"]
    division = Rehearsal(preset, clip, dtype).divide(share, memory)
    with contextlib.suppress(OSError):  # which the run tells in a moment
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"asked": asked, "division": division})
        atomically(path, lambda temporary: temporary.write_text(content, "utf-8"))
    return division
