"""How near Aurora comes to what this machine can do.

    python benchmarks/bench.py                                   # every case
    python benchmarks/bench.py --cases experts --out bench.json   # some, and the figures in a file

First the machine's own ceilings: matrix products in float32 and bfloat16, and copies. Then every case beside its floor,
the time its multiplications would take at the ceiling of its dtype. Only ratios within one run mean anything: machines
differ, and so do the hours of a shared one.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import distributed
from attention import l2_attention
from aurora import Generator
from errors import HelpFormatter, positive_int, told_in_one_line
from experts import Experts, expert, routed_experts, sliced_experts
from presets import PRESETS, Level
from train import Run
from train import parse_args as training_args

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Row:
    """One line of the result. Times are medians in milliseconds."""

    case: str
    gflop: float  # of products alone; convolutions and attention are products too
    floor_ms: float
    ours_ms: float
    peak_mb: float | None = None  # allocated at most beyond what was there before; on a GPU only

    def __str__(self):
        peak = "" if self.peak_mb is None else f"{self.peak_mb:10.0f} MB"
        ratio = self.ours_ms / self.floor_ms
        return f"{self.case:52s} {self.gflop:10.2f} {self.floor_ms:11.2f} {self.ours_ms:11.2f} {ratio:7.2f}{peak}"


HEAD = f"{'case':52s} {'GFLOP':>10s} {'floor, ms':>11s} {'ours, ms':>11s} {'ratio':>7s}"


class FlopCounter(TorchDispatchMode):
    """Adds up PyTorch's own formulas. Its FlopCounterMode also says which module, and cannot follow R1 for that."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class Machine:
    """A device and its ceilings: FLOP a second by dtype, and bytes a second of a copy, read and written."""

    def __init__(self, device, seconds):
        self.device, self.seconds = device, seconds
        side = 8192 if device.type == "cuda" else 2048
        self.flop_rate = {}
        for name, dtype in DTYPES.items():
            a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
            self.flop_rate[name] = 2 * side**3 / self.time(lambda a=a, b=b: a @ b)
        source = torch.zeros(2**28, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        self.copy_rate = 2 * source.numel() / self.time(lambda: target.copy_(source))

    def time(self, function):
        """The median of the seconds of a call, after one to warm up; a GPU is waited for."""
        function()
        timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=self.seconds).median

    def measure(self, case, function, dtype, counted=None):
        """A Row. `counted` is called in the function's place to count its FLOP, where that holds kernels of our own."""
        with FlopCounter() as counter:
            (counted or function)()
        flop = counter.total
        peak = None
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            function()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        return Row(case, flop / 1e9, 1e3 * flop / self.flop_rate[dtype], 1e3 * self.time(function), peak)


# ----------------------------------------------------------------------------------------------------------------------
# The cases. Each yields its rows.


@torch.no_grad()
def sampling(machine):
    """The release's generator, 1,166 M parameters, random weights."""
    generator = new_generator(PRESETS["aurora-64"].generator, machine.device)
    for batch in (1, 4, 16):
        yield machine.measure(f"sample, aurora-64, batch {batch}, fp32", sampler(generator, batch), "fp32")


@torch.no_grad()
def image_sizes(machine):
    """small-64 with more levels on top, which have neither attention nor experts."""
    config = PRESETS["small-64"].generator
    for resolution in (32, 64, 128, 256):
        levels = [level for level in config.levels if level.resolution <= resolution]
        while levels[-1].resolution < resolution:
            levels.append(Level(2 * levels[-1].resolution, levels[-1].channels // 2, num_blocks=2))
        generator = new_generator(dataclasses.replace(config, levels=tuple(levels)), machine.device)
        case = f"sample, small-64 made for {resolution}×{resolution}, batch 4, fp32"
        yield machine.measure(case, sampler(generator, 4), "fp32")


def new_generator(config, device):
    with torch.device(device):
        return Generator(config).eval()


def sampler(generator, batch, tokens=16):
    """A forward pass on random latents and token features."""
    config, device = generator.config, generator.w_avg.device
    z = torch.randn(batch, config.z_dim, device=device)
    text = torch.randn(batch, tokens, config.clip_width, device=device)
    eot = torch.full((batch,), tokens - 1, device=device)
    return lambda: generator(z, text, eot)


def training(machine):
    """Steps of train.py at the highest resolution, one in 16 with R1; the small CLIP stands in for a large one."""
    for preset, batch in (("shapes", 32), ("small-64", 8)):
        with tempfile.TemporaryDirectory() as folder:
            args = ["--preset", preset, "--batch", str(batch), "--clip", "small", "--out", folder, "--workers", "0"]
            run = Run(training_args(args), machine.device)
        run.progress.stage = len(run.resolutions) - 1
        run.set_stage()
        images = next(data.loader(run.source, 0, batch, 0))

        def step(number, run=run, images=images):
            run.progress.step = number
            run.step(images)

        for number, kind in ((1, ""), (0, ", with R1")):
            case = f"training step, {preset}, batch {batch}{kind}, fp32"
            yield machine.measure(case, lambda number=number: step(number), "fp32")


def experts(machine):
    """Forward and backward of routed experts of width 512, every one of them of the same size, points spread evenly."""
    gpu = machine.device.type == "cuda"
    points, dtype = (65536, "bf16") if gpu else (4096, "fp32")
    ways = {"one slice after another": sliced_experts, "grouped_mm": grouped_experts}
    if gpu:
        ways["Triton"] = routed_experts
    x, _, *stacks = expert_leaves(points, 1, machine.device, DTYPES[dtype])
    dense = forward_and_backward(lambda x, *stacks: expert(x, *(s[0] for s in stacks)), x, *stacks)
    yield machine.measure(f"one dense FFN, {points} points, {dtype}", dense, dtype)
    for num_experts in (1, 4, 16, 64):
        leaves = expert_leaves(points, num_experts, machine.device, DTYPES[dtype])
        index = torch.arange(points, device=machine.device) * 7919 % num_experts
        for name, way in ways.items():
            call = forward_and_backward(lambda x, gate, *s, way=way, index=index: way(x, index, gate, *s), *leaves)
            yield machine.measure(f"{num_experts} experts, {name}, {points} points, {dtype}", call, dtype, dense)


def expert_leaves(points, num_experts, device, dtype):
    module = Experts(512, num_experts).to(device, dtype)
    x, gate = torch.randn(points, 512, device=device, dtype=dtype), torch.rand(points, device=device, dtype=dtype)
    return [t.requires_grad_() for t in (x, gate)] + [*module.parameters()]


def grouped_experts(points, expert_index, gate, proj_in, bias_in, proj_out, bias_out):
    """PyTorch's own routed product in the experts' place, for comparison."""
    sorted_index, order = expert_index.sort()
    experts = torch.arange(len(proj_in), device=points.device)
    ends = torch.searchsorted(sorted_index, experts, right=True).int()
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm
    a, g = (product(points[order], proj_in.mT, offs=ends) + bias_in[sorted_index]).chunk(2, dim=-1)
    out = product(a * F.gelu(g), proj_out.mT, offs=ends) + bias_out[sorted_index]
    return torch.empty_like(out).index_copy(0, order, out) * gate[:, None]


def attention(machine):
    """L2 self-attention of one image, 8 heads of 64, in inference and in training."""
    for side in (8, 16, 32, 64):
        leaves = [torch.randn(1, 8, side * side, 64, device=machine.device, requires_grad=True) for _ in range(3)]
        infer = torch.no_grad()(lambda leaves=leaves: l2_attention(*leaves))
        yield machine.measure(f"attention, {side}×{side}, fp32", infer, "fp32")
        call = forward_and_backward(l2_attention, *leaves)
        yield machine.measure(f"attention, {side}×{side}, forward and backward, fp32", call, "fp32")


def forward_and_backward(function, *leaves):
    upstream = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


CASES = {
    "sample": sampling,
    "sizes": image_sizes,
    "train": training,
    "experts": experts,
    "attention": attention,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which cases to measure")
    parser.add_argument("--seconds", type=positive_int, default=2, help="to spend on each figure, at least")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, help="a .json file for the figures")
    args = parser.parse_args()
    with told_in_one_line():
        torch.manual_seed(0)
        device = distributed.start(args.device)
        machine = Machine(device, args.seconds)
        ceilings = {f"{name}, GFLOP/s": rate / 1e9 for name, rate in machine.flop_rate.items()}
        ceilings["copy, GB/s"] = machine.copy_rate / 1e9
        print(f"{distributed.describe(device)}, PyTorch {torch.__version__}")
        print(", ".join(f"{name.replace(',', ':', 1)} {rate:.0f}" for name, rate in ceilings.items()), HEAD, sep="\n\n")
        rows = []
        for case in args.cases:
            for row in tqdm(CASES[case](machine), desc=case, unit="case", leave=False):
                rows.append(row)
                tqdm.write(str(row))
        if args.out:
            figures = {"machine": distributed.describe(device), "torch": torch.__version__, "ceilings": ceilings}
            args.out.write_text(json.dumps(figures | {"rows": [vars(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
