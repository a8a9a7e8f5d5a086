"""The sparse router: one expert for every feature point, chosen from the point itself and the text-integrated w."""

from typing import NamedTuple

import torch
from torch import nn

from layers import in_float32, lrelu
from modulation import ModulatedLinear


class Routing(NamedTuple):
    """What the router decides for every feature point. The MoE loss in losses.py is computed from it."""

    logits: torch.Tensor  # [B, N, E], float32
    expert_index: torch.Tensor  # [B, N], int64: the one expert that takes the point
    gate: torch.Tensor  # [B, N]: that expert's probability; it scales the output, and so gradients reach the router

    def sent_to(self, expert_index):
        """For sampling, which can force experts: the same logits, other experts [B, N], and their probabilities."""
        gate = self.logits.softmax(-1).gather(-1, expert_index[..., None])[..., 0]
        return Routing(self.logits, expert_index, gate)


class Router(nn.Module):
    """Top-1 routing of feature points u [B, N, C] under the latent code w [B, w_dim] (section 3.2, figure 2).

    Cross-attention has already added the text to u. w brings in text and noise once more: it scales the channels of u,
    so that the same feature can go to another expert under another prompt. Everything is computed in
    float32, because rounded logits would send points to other experts. The lrelu on the logits is the release's.
    """

    def __init__(self, dim, num_experts, w_dim):
        super().__init__()
        self.to_logits = ModulatedLinear(dim, num_experts, w_dim)

    @in_float32
    def forward(self, u, w):
        logits = lrelu(self.to_logits(u, w))
        gate, expert_index = logits.softmax(-1).max(-1)
        return Routing(logits, expert_index, gate)
