"""How near Aurora comes to the speed of this machine.

    python -m experiments.bench                            # every case
    python -m experiments.bench --cases experts attention  # some

Each case is compared with its floor, the time of its multiplications at the speed of a large matrix product. The speed
of a shared machine varies, so product and case alternate: compare only ratios. It computes in bfloat16 on a GPU, where
the floors of `sample` and `train` lack the experts' products, and in float32 on a CPU.
"""

import functools
import statistics

import torch
from torch.utils.benchmark import Timer

from attention import l2_attention
from aurora import Generator
from clip import load_clip
from common import distributed
from common.cli import Parser, errors_in_one_line, positive_int
from data import sources
from experts import Experts
from presets import PRESETS
from sampling import inference
from step import Learner
from training.cuda_graph import WARM_UP
from training.plan import FlopCounter

TRAINED = {"emoji-gpu": 16, "small-64": 4}  # {preset: batch}
POINTS, WIDTH, NUM_EXPERTS = 4096, 512, 16
SIDE, HEADS, HEAD_DIM = 64, 8, 64  # of attention; the feature map is SIDE × SIDE
HEAD = f"{'case':60s} {'GFLOP':>10s} {'floor, ms':>11s} {'ours, ms':>11s} {'ratio':>7s}"


class Stopwatch:
    """Times cases on a device together with a large matrix product, each for some seconds."""

    def __init__(self, device, seconds):
        self.device, self.seconds = device, seconds
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.side = 8192 if device.type == "cuda" else 2048
        self.factor = torch.randn(self.side, self.side, device=device, dtype=self.dtype)

    def time(self, function, number=1):
        """The mean seconds of a number of calls, after waiting for the GPU."""
        timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        return timer.timeit(number).mean

    def row(self, case, function, flop=None):
        """A line under HEAD, with medians of times. flop: of the plain formula; without it, they are counted."""
        if flop is None:
            with FlopCounter() as counter:
                function()
            flop = counter.total
        number = max(1, int(0.1 / self.time(function)))  # calls to time together
        products, ours = [], []
        while not ours or sum(ours) * number < self.seconds:
            products.append(self.time(lambda: self.factor @ self.factor))
            ours.append(self.time(function, number))
        floor = flop / (2 * self.side**3) * statistics.median(products)
        mine = statistics.median(ours)
        return f"{case:60s} {flop / 1e9:10.2f} {1e3 * floor:11.2f} {1e3 * mine:11.2f} {mine / floor:7.2f}"


@torch.no_grad()
def sampling(stopwatch):
    """The synthesis network at the release's size, 1,166 M parameters, with random weights."""
    with stopwatch.device:
        generator = inference.prepare(Generator(PRESETS["aurora-64"].generator), stopwatch.dtype)
    for batch in (1, 8):
        w = torch.randn(batch, generator.config.w_dim, device=stopwatch.device)
        local_text = torch.randn(batch, 76, generator.config.text_dim, device=stopwatch.device)
        sample = functools.partial(generator.synthesis, w, local_text)
        with inference.autocast(generator):
            yield stopwatch.row(f"sampling aurora-64, batch {batch}", sample)


def training(stopwatch):
    """Steps at the highest resolution, without and with R1, with the small CLIP instead of a large one."""
    clip = load_clip("emoji", stopwatch.device)
    for name, batch in TRAINED.items():
        learner = Learner(PRESETS[name], clip, stopwatch.device, stopwatch.dtype, batch)
        batches = sources.loader(sources.open_data("emoji", learner.resolutions[-1], seed=0), 0, batch, workers=0)
        inputs = learner.prepare(0, 0, [next(batches)])
        steps = {kind: functools.partial(learner.step, number, inputs) for kind, number in (("", 1), (", with R1", 0))}
        flop = {}
        for kind, step in steps.items():
            with FlopCounter() as counter:
                step()
            flop[kind] = counter.total
        for step in WARM_UP * list(steps.values()):  # then a GPU records graphs, which have no operators to count
            step()
        for kind, step in steps.items():
            yield stopwatch.row(f"training step, {name}, batch {batch}{kind}", step, flop[kind])


def experts(stopwatch):
    """Routed experts, forward and backward, with points spread evenly."""
    x = torch.randn(POINTS, WIDTH, device=stopwatch.device, dtype=stopwatch.dtype, requires_grad=True)
    gate = torch.rand(POINTS, device=stopwatch.device, dtype=stopwatch.dtype, requires_grad=True)
    index = torch.arange(POINTS, device=stopwatch.device) * 7919 % NUM_EXPERTS
    module = Experts(WIDTH, NUM_EXPERTS).to(stopwatch.device, stopwatch.dtype)
    leaves = [x, gate, *module.parameters()]
    weights = module.proj_in[0].numel() + module.proj_out[0].numel()
    call = forward_and_backward(lambda: module(x, index, gate), leaves)
    yield stopwatch.row(f"{NUM_EXPERTS} experts of width {WIDTH}, {POINTS} points", call, 3 * 2 * POINTS * weights)


def attention(stopwatch):
    """L2 self-attention of one image, forward and backward."""
    shape = 3, 1, HEADS, SIDE**2, HEAD_DIM
    leaves = [x.requires_grad_() for x in torch.randn(shape, device=stopwatch.device, dtype=stopwatch.dtype).unbind()]
    distances, values = HEAD_DIM + 2, HEAD_DIM  # factors of an entry of the map; a distance is a product and two norms
    flop = 3 * 2 * HEADS * SIDE**4 * (distances + values)
    call = forward_and_backward(lambda: l2_attention(*leaves), leaves)
    yield stopwatch.row(f"attention over {SIDE}×{SIDE} points", call, flop)


def forward_and_backward(function, leaves):
    upstream = torch.randn_like(function())
    return lambda: torch.autograd.grad(function(), leaves, upstream)


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
