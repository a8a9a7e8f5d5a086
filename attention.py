"""Attention by L2 distance. Unlike dot products it can be Lipschitz (Kim et al. 2021; GigaGAN, section 3.1).

The proof needs squared distances and q = k. The discriminator's attention has both; the generator's, as released, has
neither. The modules are in aurora.py and discriminator.py.
"""

import math

import torch

from layers import float32_region, full_precision, recomputed

try:
    from kernels.l2_attention import fused_l2_attention
except ImportError:  # Triton comes with PyTorch on Linux only
    fused_l2_attention = None

FUSED_ON = {"cuda"}  # devices that use the Triton kernel; training/plan.py adds "cpu", to count what a GPU would do
MAP_ENTRIES = {"cpu": 2**19, "cuda": 2**26}  # entries of the attention map in memory at a time; 2**19 fit a CPU's cache


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
    """Computes l2_attention_plain in memory that grows with the number of feature points N, not with N².

    A GPU uses a Triton kernel, which stores no map; elsewhere the map is computed block by block. The result has the
    dtype of v.
    """
    fused = q.device.type in FUSED_ON and fused_l2_attention and q.dtype != torch.float64
    return fused_l2_attention(q, k, v) if fused else blockwise_l2_attention(q, k, v)


def blockwise_l2_attention(q, k, v):
    """Computes the map one block after another, in float32, and each block again in the backward pass. A block is
    several whole maps if they fit (the inner loop then runs once), else some rows of one map.
    """
    n, t = q.shape[2], k.shape[2]
    batch_and_heads = q.shape[:2]  # a map for each
    entries = MAP_ENTRIES[q.device.type]
    maps_at_a_time = max(1, entries // (n * t))
    rows_at_a_time = max(1, entries // t)  # at least n, if a map fits
    results = []
    with float32_region(q):
        groups = (full_precision(x).flatten(0, 1).split(maps_at_a_time) for x in (q, k, v))
        for some_q, some_k, some_v in zip(*groups, strict=True):  # each [≤ maps_at_a_time, N or T, …]
            parts = []
            for q_rows in some_q.split(rows_at_a_time, dim=1):
                parts.append(recomputed(attend, q_rows, some_k, some_v))
            results.append(torch.cat(parts, dim=1))
    return torch.cat(results).unflatten(0, batch_and_heads).to(v.dtype)


def attend(q, k, v):
    """One block of l2_attention_plain, [maps, N or T, d], by matrix products: ‖q − k‖² is ‖q‖² − 2q·k + ‖k‖².

    Where q = k, the root has an infinite gradient; cdist makes it zero.
    """
    scale = 1 / math.sqrt(q.shape[-1])
    distance = torch.cdist(scale * q, scale * k, compute_mode="use_mm_for_euclid_dist")
    return torch.bmm((-distance).softmax(-1), v)
