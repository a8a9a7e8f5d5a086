"""The experts: a stack of GEGLU feed-forward networks. Each feature point visits exactly one of them."""

import math

import torch
import torch.nn.functional as F
from torch import nn

try:
    from kernels.routed import routed_experts
except ImportError:  # Triton comes with PyTorch on Linux only
    routed_experts = None

POINTS_AT_A_TIME = 512  # of one expert on a CPU, so that their 8C activations before gating fit the cache


class Experts(nn.Module):
    """E feed-forward networks: C → 8C, halved into a and g; a·gelu(g) → C.

    forward: points [P, C], expert_index [P], gate [P] → gate · expert(point), [P, C].

    The points are sorted by expert, so that each expert multiplies one contiguous slice; together this costs as much as
    one expert over all points. No point is ever dropped. On a GPU, Triton kernels run all experts at once; tests
    compare both.

    All experts share each of the four parameter tensors. So each tensor always gets a gradient, which is zero for an
    expert without points, and DDP never waits.

    For top-k routing call this once for each choice, and add the results.
    """

    def __init__(self, dim, num_experts):
        super().__init__()
        hidden = 4 * dim
        self.proj_in = nn.Parameter(torch.randn(num_experts, 2 * hidden, dim) / math.sqrt(dim))
        self.bias_in = nn.Parameter(torch.zeros(num_experts, 2 * hidden))
        self.proj_out = nn.Parameter(torch.randn(num_experts, dim, hidden) / math.sqrt(hidden))
        self.bias_out = nn.Parameter(torch.zeros(num_experts, dim))
        self.lr_scale = {"proj_in": 1 / math.sqrt(dim), "proj_out": 1 / math.sqrt(hidden)}

    def forward(self, points, expert_index, gate):
        assert expert_index.shape == gate.shape == points.shape[:1], "each point takes one expert"
        fused = points.is_cuda and routed_experts and points.dtype != torch.float64
        apply = routed_experts if fused else sliced_experts
        return apply(points, expert_index, gate, self.proj_in, self.bias_in, self.proj_out, self.bias_out)


def sliced_experts(points, expert_index, gate, proj_in, bias_in, proj_out, bias_out):
    """The plain form: sort the points by expert, apply each expert to its slice, and restore the order."""
    order = expert_index.argsort()
    counts = expert_index.bincount(minlength=len(proj_in)).tolist()
    outputs = []
    for its_points, *weights in zip(points[order].split(counts), proj_in, bias_in, proj_out, bias_out, strict=True):
        for some in its_points.split(POINTS_AT_A_TIME):  # an expert without points has one empty piece
            outputs.append(expert(some, *weights))
    outputs = torch.cat(outputs)
    return torch.empty_like(outputs).index_copy(0, order, outputs) * gate[:, None]


def expert(points, proj_in, bias_in, proj_out, bias_out):
    """One expert, applied to its points: [P, C] → [P, C]."""
    a, g = F.linear(points, proj_in, bias_in).chunk(2, dim=-1)
    return F.linear(a * F.gelu(g), proj_out, bias_out)
