"""Attention by L2 distance, which is Lipschitz where the dot product is not (Kim et al. 2021; GigaGAN, section 3.1).

The generator's keeps no attention map, so that its memory grows with the number of feature points N, not with N².
The discriminator's must be differentiated twice, for R1, and is left to autograd.
"""

import math

import torch
import torch.nn.functional as F

from layers import float32_region, full_precision

BLOCK = {
    "cpu": 2**19,
    "cuda": 2**28,
}  # entries of a map held at a time; on a CPU they should fit its cache
MIN_DISTANCE = 1e-6  # nearer than this counts as this, without a slope, which would be infinite at zero


def split_heads(x, num_heads):
    """[B, N, heads·d] → [B, heads, N, d]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x):
    """[B, heads, N, d] → [B, N, heads·d]."""
    return x.transpose(1, 2).flatten(2)


def l2_attention(q, k, v):
    """softmax(−‖q − k‖₂/√d)·v over [B, heads, N, d]: the true distance, not its square.

    In training it is computed in float32 under autocast too: its slope is divided by the distance.
    """
    dtype = v.dtype
    if torch.is_grad_enabled():
        q, k, v = full_precision(q), full_precision(k), full_precision(v)
    with float32_region(q):
        scale = 1 / q.shape[-1]  # of squared distances
        (high_q, low_q), (high_k, low_k) = square_norm(q, scale), square_norm(k, scale)
        one = torch.ones_like(high_q[..., :1, :]).expand
        # |q − k|²/d as one product, of vectors that are four numbers longer.
        q = torch.cat([-2 * scale * q, high_q, low_q, one(high_q.shape), one(high_q.shape)], dim=-1)
        k = torch.cat([k, one(high_k.shape), one(high_k.shape), high_k, low_k], dim=-1)
        h = BlockwiseAttention.apply(*(x.flatten(0, 1) for x in (q, k, v)))
    return h.unflatten(0, v.shape[:2]).to(dtype)


def square_norm(x, scale):
    """scale·|x|² of vectors [..., d], as two numbers [..., 1] of its dtype, the second what rounding takes off."""
    exact = torch.linalg.vector_norm(full_precision(x), dim=-1, keepdim=True).square() * scale
    high = exact.to(x.dtype)
    return high, (exact - high).to(x.dtype)


class BlockwiseAttention(torch.autograd.Function):
    """softmax(−√(q·kᵀ))·v over [B·heads, N or T, …], block by block of the map, forward and backward.

    Every pass over a block is made in place, in memory that the blocks share. The backward pass computes the map again.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        h = v.new_empty(*q.shape[:2], v.shape[-1])
        for heads, rows, distance, weights in blocks(q, k, 2):
            measure(q[heads, rows], k[heads], distance)
            torch.softmax(distance.neg_(), dim=-1, out=weights)
            torch.bmm(weights, v[heads], out=h[heads, rows])
        ctx.save_for_backward(q, k, v, h)
        return h

    @staticmethod
    def backward(ctx, upstream):
        q, k, v, h = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        mean_slope = (upstream * h).sum(-1, keepdim=True)  # Σ weights · their slopes, which softmax subtracts
        for heads, rows, distance, weights, slope in blocks(q, k, 3):
            measure(q[heads, rows], k[heads], distance)
            torch.softmax(torch.neg(distance, out=slope), dim=-1, out=weights)
            grad_v[heads] += weights.mT @ upstream[heads, rows]
            torch.bmm(upstream[heads, rows], v[heads].mT, out=slope)
            slope.sub_(mean_slope[heads, rows]).mul_(weights)  # of the negative distance
            slope.div_(F.threshold_(distance, MIN_DISTANCE, math.inf))  # of the square, times −2
            grad_q[heads, rows] = slope @ k[heads]
            grad_k[heads] += slope.mT @ q[heads, rows]
        return grad_q.mul_(-0.5), grad_k.mul_(-0.5), grad_v


def blocks(q, k, count):
    """Cuts the map of q [G, N, d] and k [G, T, d] → of each block its heads, its rows, and `count` scratch tensors."""
    (num_heads, n, _), t = q.shape, k.shape[1]
    heads = min(num_heads, max(1, BLOCK[q.device.type] // (n * t)))
    rows = min(n, max(1, BLOCK[q.device.type] // t))
    scratch = q.new_empty(count, heads * rows * t)
    for head in range(0, num_heads, heads):
        for row in range(0, n, rows):
            shape = (min(heads, num_heads - head), min(rows, n - row), t)
            parts = (s[: math.prod(shape)].view(shape) for s in scratch)
            yield slice(head, head + heads), slice(row, row + rows), *parts


def measure(q, k, distance):
    """√(q·kᵀ), written to `distance`."""
    torch.bmm(q, k.mT, out=distance)
    distance.clamp_(min=MIN_DISTANCE**2).sqrt_()


def squared_l2_attention(qk, v):
    """softmax(−‖q − k‖₂²/√d)·v with q = k, over [B, heads, N, d]: twice differentiable, also where two points meet.

    The true distance has an infinite slope at zero, and every point is at distance zero from itself here. The term |q|²
    is the same for all keys, so the softmax drops it.
    """
    with float32_region(qk):
        qk = full_precision(qk)
        logits = (2 * qk @ qk.transpose(-1, -2) - qk.square().sum(-1)[..., None, :]) / math.sqrt(qk.shape[-1])
        attention = logits.softmax(-1)
    return attention.to(v.dtype) @ v
