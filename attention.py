"""Attention by L2 distance, which can be Lipschitz where dot products cannot (Kim et al. 2021; GigaGAN, section 3.1).

The proof needs tied weights, q = k. The discriminator has them. The generator, as released, keeps q and k apart.
"""

import math

import torch

from layers import float32_region, full_precision, recomputed

BLOCK = {"cpu": 2**19, "cuda": 2**26}  # Entries of an attention map in memory at a time; a CPU's cache holds 2**19.
MIN_DISTANCE = 1e-6  # Lesser distances become this one, and get no gradient: the slope of a root at zero is infinite.


def split_heads(x, num_heads):
    """[B, N, heads·d] → [B, heads, N, d]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x):
    """[B, heads, N, d] → [B, N, heads·d]."""
    return x.transpose(1, 2).flatten(2)


def l2_attention_plain(q, k, v):
    """softmax(−‖q − k‖₂/√d)·v over [B, heads, N or T, d]: the true distance, not its square."""
    distance = torch.linalg.vector_norm(q[..., :, None, :] - k[..., None, :, :], dim=-1)  # [B, heads, N, T]
    return (-distance / math.sqrt(q.shape[-1])).softmax(-1) @ v


def l2_attention(q, k, v):
    """What l2_attention_plain computes, in memory that grows with the number of feature points N, not with N².

    The map is made block by block, and each block again in the backward pass. The precision is that of q, k and v,
    under autocast too.
    """
    batch, (n, t) = q.shape[:2], (q.shape[2], k.shape[2])
    size = BLOCK[q.device.type]
    maps, rows = max(1, size // (n * t)), max(1, size // t)  # in a block: whole maps, or rows of one
    with float32_region(q):
        q, k, v = (x.flatten(0, 1) for x in (*distance_factors(q, k), v))  # [B·heads, N or T, …]
        groups = zip(q.split(maps), k.split(maps), v.split(maps), strict=True)
        h = [[recomputed(attend, part, k, v) for part in q.split(rows, dim=1)] for q, k, v in groups]
    return torch.cat([torch.cat(parts, dim=1) for parts in h]).unflatten(0, batch)


def distance_factors(q, k):
    """q [..., N, d] and k [..., T, d] → two matrices of d + 4 columns, whose product is |q − k|²/d, [..., N, T].

    |q|² − 2q·k + |k|² is a small difference of large terms where q and k are near. As one product it is summed in
    float32 whatever its inputs are. |q|² and |k|² take two columns each: rounded to a single bfloat16, they would err
    by more than such distances.
    """
    scale = 1 / q.shape[-1]
    (q_high, q_low), (k_high, k_low) = square_norm(q, scale), square_norm(k, scale)
    one_q, one_k = torch.ones_like(q_high), torch.ones_like(k_high)
    left = torch.cat([-2 * scale * q, q_high, q_low, one_q, one_q], dim=-1)
    return left, torch.cat([k, one_k, one_k, k_high, k_low], dim=-1)


def square_norm(x, scale):
    """scale·|x|² of vectors [..., d] as the sum of two numbers of x's dtype, [..., 1] each."""
    exact = torch.linalg.vector_norm(full_precision(x), dim=-1, keepdim=True).square() * scale
    high = exact.to(x.dtype)
    return high, (exact - high).to(x.dtype)


def attend(q, k, v):
    """softmax(−√(q·kᵀ))·v of one block, with q and k from distance_factors: [maps, N or T, …]."""
    distance = torch.bmm(q, k.mT).clamp(min=MIN_DISTANCE**2).sqrt()
    return torch.bmm((-distance).softmax(-1), v)


def squared_l2_attention(qk, v):
    """softmax(−‖q − k‖₂²/√d)·v with q = k, over [B, heads, N, d]: twice differentiable, as R1 asks for.

    The true distance has an infinite slope at zero, and every point is at distance zero from itself here. The term |q|²
    is the same for all keys, so the softmax drops it. Left to autograd, it keeps the map in memory.
    """
    with float32_region(qk):
        qk = full_precision(qk)
        logits = (2 * qk @ qk.transpose(-1, -2) - qk.square().sum(-1)[..., None, :]) / math.sqrt(qk.shape[-1])
        attention = logits.softmax(-1)
    return attention.to(v.dtype) @ v
