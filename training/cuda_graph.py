"""CUDA graphs: a step of a small network is thousands of small kernels, and launching them takes longer than running
them. A graph launches all of them at once.
"""

import torch
from torch.utils import _pytree as pytree

WARM_UP = 3  # calls of each variant before recording: libraries choose algorithms, Adam makes its averages


class Graphed:
    """Records function(tensors, variant) once for each variant, and replays it from then on.

    tensors: nested dicts, lists and tuples of tensors whose shapes never change. variant: one of the plain values in
    `variants`. The function must not wait for the device. The next call overwrites its result.
    """

    def __init__(self, function, variants):
        self.function = function
        self.calls, self.recorded = dict.fromkeys(variants, 0), {}
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, tensors, variant):
        self.calls[variant] += 1
        if min(self.calls.values()) <= WARM_UP:  # a graph keeps its memory, so other variants warm up first
            return self.on_a_side_stream(tensors, variant)
        if variant not in self.recorded:
            self.recorded[variant] = self.record(tensors, variant)
        graph, inputs, result = self.recorded[variant]
        torch._foreach_copy_(inputs, pytree.tree_leaves(tensors))
        graph.replay()
        return result

    def on_a_side_stream(self, tensors, variant):
        """Calls the function on the stream of the recording. A backward pass runs on the stream of its forward pass,
        and the default stream cannot be recorded.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.function(tensors, variant)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, tensors, variant):
        """→ the graph, the tensors that it reads, and its result. Nothing is computed yet."""
        inputs = pytree.tree_map(torch.clone, tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = self.function(inputs, variant)
        return graph, pytree.tree_leaves(inputs), result
