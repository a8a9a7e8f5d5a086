"""How a benchmark measures: a product and a case take turns, so that only their ratio means anything."""

import gc
import itertools
import os
import statistics
import time

import torch
from torch.utils.benchmark import Timer

from sampling.inference import DTYPES
from training.plan import FlopCounter

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler that measures memory is chatty

LONG = 5  # seconds; what takes longer is not called again
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


class Stopwatch:
    """Times cases on a device beside a large matrix product, each for so many seconds."""

    def __init__(self, device, seconds):
        self.device, self.seconds = device, seconds
        self.side = 8192 if device.type == "cuda" else 2048
        self.operands = {name: torch.randn(self.side, self.side, device=device, dtype=x) for name, x in DTYPES.items()}

    def time(self, function, number=1):
        """The seconds of a call, the mean of so many; a GPU is waited for."""
        timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        return timer.timeit(number).mean

    def row(self, case, function, dtype, counted=None):
        """A line under HEAD: FLOP of products, medians of times, the memory allocated at most beyond what was there.

        counted: called in the function's place to count its FLOP, where that is a way of its own.
        """
        a, number = self.operands[dtype], 1
        with FlopCounter() as counter:
            (counted or function)()
        peak = (peak_memory if self.device.type == "cpu" else peak_memory_of_gpu)(function)
        products, ours = [], []
        while len(ours) < 2 or sum(ours) * number < self.seconds:
            products.append(self.time(lambda: a @ a))
            ours.append(self.time(function, number))
            if len(ours) == 1:  # the first call is a warm-up, which says how many to take together
                number = max(1, int(0.1 / ours[0]))
        floor = counter.total / (2 * self.side**3) * statistics.median(products)
        mine = statistics.median(ours[1:])
        times = f"{counter.total / 1e9:10.2f} {1e3 * floor:11.2f} {1e3 * mine:11.2f} {mine / floor:7.2f}"
        return f"{case:60s} {times} {peak / 2**20:9.0f}"
