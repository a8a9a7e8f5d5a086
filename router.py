"""The sparse router: one expert for every feature point, chosen from the point itself and the text-integrated w."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from layers import Float32, ModulatedLinear, lrelu


class Routing(NamedTuple):
    """What the router decides for every feature point."""

    logits: torch.Tensor  # [B, N, E], float32
    expert_index: torch.Tensor  # [B, N], int64: the one expert that takes the point
    gate: torch.Tensor  # [B, N]: that expert's probability; it scales the output, and so gradients reach the router

    @property
    def aux_loss(self):
        """The two auxiliary losses as the release weighs them, a scalar."""
        return 0.001 * z_loss(self.logits) + 0.001 * load_balancing_loss(self.logits, self.expert_index)


class Router(Float32):
    """Top-1 routing of feature points u [B, N, C] under the latent code w [B, w_dim] (section 3.2, figure 2).

    w carries the text and the noise and scales the channels of u, so the same feature may go to another expert under
    another prompt. Computed in float32: rounding the logits would send points to other experts.
    """

    def __init__(self, dim, num_experts, w_dim):
        super().__init__()
        self.to_logits = ModulatedLinear(dim, num_experts, w_dim)

    def forward(self, u, w):
        logits = lrelu(self.to_logits(u, w))
        gate, expert_index = logits.softmax(-1).max(-1)
        return Routing(logits, expert_index, gate)


def z_loss(logits):
    """The mean over points of logsumexp(logits)², which keeps the logits small (ST-MoE, equation 5)."""
    return logits.logsumexp(-1).square().mean()


def load_balancing_loss(logits, expert_index):
    """E·Σₑ fₑ·Pₑ per image, then the batch mean (Switch Transformer, equations 4 to 6); one when balanced.

    fₑ is the share of the image's points that expert e takes, Pₑ its mean probability over them.
    """
    num_experts = logits.shape[-1]
    share = F.one_hot(expert_index, num_experts).to(logits.dtype).mean(1)
    probability = logits.softmax(-1).mean(1)
    return num_experts * (share * probability).sum(-1).mean()


def count_points(expert_index, num_experts):
    """How many feature points each expert takes: indices of any shape → [E]. No host sync, which bincount needs."""
    return (expert_index.flatten()[:, None] == torch.arange(num_experts, device=expert_index.device)).sum(0)
