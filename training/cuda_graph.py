"""CUDA graphs: a small network's step is thousands of small kernels, and to launch them one by one takes longer than to
run them. A graph launches all of them at once.
"""

import torch
from torch.utils import _pytree as pytree

WARM_UP = 3  # calls of each variant before one is recorded: libraries choose their algorithms, Adam makes its averages


class Graphed:
    """function(tensors, variant), recorded once for each variant and played back from then on.

    function: of tensors in any nest of dicts, lists and tuples, always of the same shapes, and of a plain value out of
    `variants`, which says what is done with them. It must not wait for the device. Its result is overwritten by the
    next call.
    """

    def __init__(self, function, variants):
        self.function = function
        self.calls, self.recorded = dict.fromkeys(variants, 0), {}
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, tensors, variant):
        self.calls[variant] += 1
        if min(self.calls.values()) <= WARM_UP:  # a graph keeps its memory, and another variant must warm up beside it
            return self.on_a_side_stream(tensors, variant)
        if variant not in self.recorded:
            self.recorded[variant] = self.record(tensors, variant)
        graph, inputs, result = self.recorded[variant]
        torch._foreach_copy_(inputs, pytree.tree_leaves(tensors))
        graph.replay()
        return result

    def on_a_side_stream(self, tensors, variant):
        """The stream of the recording: a backward pass runs where its forward pass ran, and the default stream cannot
        be recorded.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.function(tensors, variant)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, tensors, variant):
        """→ the graph, the tensors that it reads, and what it returns. Nothing is computed yet."""
        inputs = pytree.tree_map(torch.clone, tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = self.function(inputs, variant)
        return graph, pytree.tree_leaves(inputs), result
