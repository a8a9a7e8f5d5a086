"""How a benchmark measures: a product and a case take turns, so that only their ratio means anything."""

import gc
import itertools
import os
import statistics
import time
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

from sampling.inference import DTYPES
from training.plan import FlopCounter

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler that measures memory is chatty

LONG = 5  # seconds; what takes longer is not called again


@dataclass
class Row:
    """One line of the result. Times are medians in milliseconds."""

    case: str
    gflop: float  # of products alone; convolutions and attention are products too
    floor_ms: float
    ours_ms: float
    peak_mb: float  # allocated at most beyond what was there before

    def __str__(self):
        ratio = self.ours_ms / self.floor_ms
        times = f"{self.gflop:10.2f} {self.floor_ms:11.2f} {self.ours_ms:11.2f} {ratio:7.2f}"
        return f"{self.case:60s} {times} {self.peak_mb:9.0f}"


@dataclass
class Note:
    """A line of the result without times."""

    text: str

    def __str__(self):
        return self.text


HEAD = f"{'case':60s} {'GFLOP':>10s} {'floor, ms':>11s} {'ours, ms':>11s} {'ratio':>7s} {'peak, MB':>9s}"


def peak_memory(function):
    """The bytes that PyTorch's CPU allocator held at most during a call, beyond what it held before."""
    gc.collect()  # or what others left would be freed during the call, and count against it
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
    """The least that the processor spends on a call, of three or fewer: the time that others use it does not count."""
    spent = []
    while not spent or (len(spent) < 3 and sum(spent) < LONG):
        started = time.process_time()
        function()
        spent.append(time.process_time() - started)
    return min(spent)


class Machine:
    """A device, and the time it takes for a large matrix product of either dtype."""

    def __init__(self, device, seconds):
        self.device, self.seconds = device, seconds
        side = 8192 if device.type == "cuda" else 2048
        self.product_flop = 2 * side**3
        operands = {name: torch.randn(side, side, device=device).to(dtype) for name, dtype in DTYPES.items()}
        self.products = {name: lambda a=a: a @ a for name, a in operands.items()}
        self.ceilings = self.measure_ceilings()

    def time(self, function, number=1):
        """The seconds of a call, the mean of so many; a GPU is waited for."""
        timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        return timer.timeit(number).mean

    def measure_ceilings(self):
        """FLOP a second of either product, and bytes a second of a copy, read and written."""
        source = torch.zeros(2**28, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        calls = {**self.products, "copy": lambda: target.copy_(source)}
        seconds = {name: min(self.time(call) for _ in range(10)) for name, call in calls.items()}
        return {
            **{f"{name}, GFLOP/s": self.product_flop / seconds[name] / 1e9 for name in self.products},
            "copy, GB/s": 2 * source.numel() / seconds["copy"] / 1e9,
        }

    def measure(self, case, function, dtype, counted=None):
        """A Row. `counted` is called in the function's place to count its FLOP, where that is a way of its own."""
        with FlopCounter() as counter:
            (counted or function)()
        peak = (peak_memory if self.device.type == "cpu" else peak_memory_of_gpu)(function)
        product, number = self.products[dtype], max(1, int(0.1 / self.time(function)))
        products, ours = [], []
        while len(ours) < 3 or sum(ours) * number < self.seconds:
            products.append(self.time(product))
            ours.append(self.time(function, number))
        floor = counter.total / self.product_flop * statistics.median(products)
        return Row(case, counter.total / 1e9, 1e3 * floor, 1e3 * statistics.median(ours), peak / 2**20)
