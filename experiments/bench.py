"""How near Aurora comes to the speed of this machine.

    python -m experiments.bench                            # every case
    python -m experiments.bench --cases experts attention  # some

Each case is compared with its floor, the time of its multiplications at the speed of a large matrix product. The speed
of a shared machine varies, so product and case alternate: compare only ratios. FLOP are those of the plain formulas,
even if a faster implementation computes something twice.
"""

import common.interrupts  # noqa: F401

import gc
import itertools
import os
import statistics
import time

import torch
from torch.utils.benchmark import Timer

from attention import attend, l2_attention
from aurora import Generator
from clip import load_clip
from common import distributed
from common.cli import Parser, errors_in_one_line, positive_int
from data import sources
from experts import Experts, expert
from losses import R1_INTERVAL
from presets import PRESETS, fitted_to
from sampling import inference
from sampling.inference import DTYPES
from step import Learner
from training.cuda_graph import WARM_UP
from training.plan import FlopCounter

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the memory profiler prints too much

TRAINED = {"cpu": {"emoji-gpu": 16, "small-64": 8}, "cuda": {"emoji-gpu": 64, "small-64": 32}}  # presets, batches
POINTS = {"cpu": 4096, "cuda": 65536}  # in a batch of experts
SIDES = 16, 32, 64  # of the feature maps of attention
LONG = 5  # seconds; a longer call is not repeated
HEAD = f"{'case':60s} {'GFLOP':>10s} {'floor, ms':>11s} {'ours, ms':>11s} {'ratio':>7s} {'peak, MB':>9s}"

# ----------------------------------------------------------------------------------------------------------------------
# How a case is measured.


def peak_memory(function):
    """The peak bytes of PyTorch's CPU allocator during a call, minus those before."""
    gc.collect()  # otherwise older garbage may be freed during the call
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


def peak_memory_of_gpu(function):
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


def processor_seconds(function):
    """The minimum processor time of up to three calls; time of other processes does not count."""
    spent = []
    while not spent or (len(spent) < 3 and sum(spent) < LONG):
        started = time.process_time()
        function()
        spent.append(time.process_time() - started)
    return min(spent)


class Stopwatch:
    """Times cases on a device together with a large matrix product, each for some seconds."""

    def __init__(self, device, seconds):
        self.device, self.seconds = device, seconds
        self.side = 8192 if device.type == "cuda" else 2048
        self.operands = {name: torch.randn(self.side, self.side, device=device, dtype=x) for name, x in DTYPES.items()}

    def time(self, function, number=1):
        """The mean seconds of a number of calls, after waiting for the GPU."""
        timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        return timer.timeit(number).mean

    def row(self, case, function, dtype, counted=None):
        """A line under HEAD: FLOP of products, medians of times, peak memory minus that before the call.

        counted: a plain implementation of the function, to count its FLOP.
        """
        a, number = self.operands[dtype], 1
        with FlopCounter() as counter:
            (counted or function)()
        peak = (peak_memory if self.device.type == "cpu" else peak_memory_of_gpu)(function)
        products, ours = [], []
        while len(ours) < 2 or sum(ours) * number < self.seconds:
            products.append(self.time(lambda: a @ a))
            ours.append(self.time(function, number))
            if len(ours) == 1:  # a warm-up, which gives the number of calls to time together
                number = max(1, int(0.1 / ours[0]))
        floor = counter.total / (2 * self.side**3) * statistics.median(products)
        mine = statistics.median(ours[1:])
        times = f"{counter.total / 1e9:10.2f} {1e3 * floor:11.2f} {1e3 * mine:11.2f} {mine / floor:7.2f}"
        return f"{case:60s} {times} {peak / 2**20:9.0f}"


# ----------------------------------------------------------------------------------------------------------------------
# The cases. Each yields its rows.


@torch.no_grad()
def sampling(stopwatch):
    """The synthesis network at the release's size, 1,166 M parameters, with random weights."""
    with stopwatch.device:
        generator = Generator(PRESETS["aurora-64"].generator)
    for dtype in DTYPES:  # float32 first, then the same weights in bfloat16
        inference.prepare(generator, DTYPES[dtype])
        for batch in (1, 8):
            w = torch.randn(batch, generator.config.w_dim, device=stopwatch.device)
            local_text = torch.randn(batch, 76, generator.config.text_dim, device=stopwatch.device)

            def sample(w=w, local_text=local_text):
                with inference.autocast(generator):
                    generator.synthesis(w, local_text)

            yield stopwatch.row(f"sampling aurora-64, batch {batch}, {dtype}", sample, dtype)


def training(stopwatch):
    """Steps at the highest resolution, with and without R1, with the small CLIP instead of a large one."""
    clip = load_clip("emoji", stopwatch.device)
    for name, batch in TRAINED[stopwatch.device.type].items():
        preset = fitted_to(PRESETS[name], clip.width, clip.map_shapes())
        learner = Learner(preset, clip, stopwatch.device, torch.float32, batch)
        batches = sources.loader(sources.open_data("emoji", learner.resolutions[-1], seed=0), 0, batch, workers=0)
        inputs = learner.prepare(0, 0, [next(batches)])
        if stopwatch.device.type == "cuda":  # records the CUDA graph, as train.py does
            for number in (0, 1) * (WARM_UP + 1):
                learner.step(number, inputs)
        for number, kind in ((1, ""), (0, ", with R1")):
            interval = 0 if number else R1_INTERVAL
            yield stopwatch.row(
                f"training step, {name}, batch {batch}{kind}, fp32",
                lambda learner=learner, number=number, inputs=inputs: learner.step(number, inputs),
                "fp32",
                lambda learner=learner, inputs=inputs, interval=interval: learner.update_networks(inputs, interval),
            )


def experts(stopwatch):
    """Forward and backward of one dense layer and of routed experts, all of width 512, with points spread evenly."""
    device, width = stopwatch.device, 512
    points, dtype = POINTS[device.type], "bf16" if device.type == "cuda" else "fp32"
    x = torch.randn(points, width, device=device, dtype=DTYPES[dtype], requires_grad=True)
    gate = torch.rand(points, device=device, dtype=DTYPES[dtype], requires_grad=True)
    one = [stack[0].detach().requires_grad_() for stack in Experts(width, 1).to(device, DTYPES[dtype]).parameters()]
    dense = forward_and_backward(expert, x, *one)
    yield stopwatch.row(f"one dense layer, {points} points, {dtype}", dense, dtype)
    for num_experts in (1, 16, 64):
        module = Experts(width, num_experts).to(device, DTYPES[dtype])
        index = torch.arange(points, device=device) * 7919 % num_experts

        def routed(x, gate, *_, module=module, index=index):
            return module(x, index, gate)

        call = forward_and_backward(routed, x, gate, *module.parameters())
        yield stopwatch.row(f"{num_experts} experts, {points} points, {dtype}", call, dtype, dense)


def attention(stopwatch):
    """L2 self-attention of one image with 8 heads of 64, in inference and in training."""
    dtype = "bf16" if stopwatch.device.type == "cuda" else "fp32"
    for side in SIDES:
        qkv = torch.randn(3, 1, 8, side * side, 64, device=stopwatch.device, dtype=DTYPES[dtype]).unbind()
        leaves = [x.requires_grad_() for x in qkv]
        unreal = [
            x.detach().to("meta", torch.float32).requires_grad_() for x in qkv
        ]  # without memory for the attention maps

        @torch.no_grad()
        def infer(leaves=leaves):
            l2_attention(*leaves)

        @torch.no_grad()
        def plain(unreal=unreal):
            whole_maps(*unreal)

        yield stopwatch.row(f"attention, {side}×{side}, {dtype}", infer, dtype, plain)
        train, plain = forward_and_backward(l2_attention, *leaves), forward_and_backward(whole_maps, *unreal)
        yield stopwatch.row(f"attention, {side}×{side}, forward and backward, {dtype}", train, dtype, plain)


def whole_maps(q, k, v):
    """Like l2_attention, with the whole attention maps in memory."""
    return attend(*(x.flatten(0, 1) for x in (q, k, v)))


def forward_and_backward(function, *leaves):
    upstream = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


CASES = {"sample": sampling, "train": training, "experts": experts, "attention": attention}


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", action="extend", choices=CASES, help="which cases (default: all)")
    parser.add_argument("--seconds", type=positive_int, default=2, help="minimum time to measure each case")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args()
    with errors_in_one_line():
        torch.manual_seed(0)
        device = distributed.start(args.device)
        print(f"{distributed.describe(device)}, PyTorch {torch.__version__}", HEAD, sep="\n\n")
        stopwatch = Stopwatch(device, args.seconds)
        for case in args.cases or CASES:
            for row in CASES[case](stopwatch):
                print(row, flush=True)


if __name__ == "__main__":
    main()
