"""L2 attention as Triton kernels: softmax(−‖q − k‖₂/√d)·v and its gradients, without an attention map in memory.

attention.py defines it in plain PyTorch. The order of work is FlashAttention's (Dao 2023): a tile of rows visits all
keys and rescales its softmax on the way; the backward pass computes the map again from the logarithm of each row's sum.
For 8 heads of 64×64 points, a map in float32 has 512 MiB, and every operator on it reads and writes as much. The
forward kernel reads and writes 16 MiB if q, k and v are bfloat16.

Letters: M maps (batch · heads), N feature points, T keys, D the width of a head. Products have the dtype of the inputs
and accumulate in float32, never in TF32. Products of bfloat16 are exact in float32, so distances lose nothing. The map
is rounded to the dtype of its factor.
"""

import math

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula


def tile(q, backward=False):
    """Constants of a launch: the rows of a tile, the columns that it visits at a time, the padded width of a head.

    With more rows or columns, some kernels spill registers (tests/kernels/test_compiled.py).
    """
    width = {"D": q.shape[-1], "WIDTH": max(16, triton.next_power_of_2(q.shape[-1]))}
    if q.device.type == "cpu":  # Triton's interpreter, in a test
        return width | {"ROWS": 32, "COLUMNS": 16}
    columns = (64 if backward else 128) // q.element_size()
    return width | {"ROWS": 256 // q.element_size(), "COLUMNS": columns, "num_warps": 8}


@triton.jit
def load_rows(ptr, first, LENGTH, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows of [LENGTH, D] → [ROWS, WIDTH]; outside it, zeros."""
    rows, columns = first + tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    return tl.load(ptr + rows * D + columns, mask=(rows < LENGTH) & (columns < D), other=0)


@triton.jit
def store_rows(ptr, tile, first, LENGTH, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    rows, columns = first + tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    tl.store(ptr + rows * D + columns, tile.to(ptr.dtype.element_ty), mask=(rows < LENGTH) & (columns < D))


@triton.jit
def load_norms(ptr, first, LENGTH, ROWS: tl.constexpr):
    """Squared norms [LENGTH] → [ROWS]; outside, so large that the weight is zero."""
    rows = first + tl.arange(0, ROWS)
    return tl.load(ptr + rows, mask=rows < LENGTH, other=1e38)


@triton.jit
def product(x, y):
    """x·yᵀ in float32."""
    return tl.dot(x, tl.trans(y), input_precision="ieee")


@triton.jit
def logits_in_bits(x, y, x_norms, y_norms, D: tl.constexpr):
    """For all rows of x and y: −‖x − y‖/√D in units of log 2, as exp2 is faster; and 1/‖x − y‖, which is 0 if x = y."""
    squared = x_norms[:, None] + y_norms[None, :] - 2 * product(x, y)
    apart = squared > 1e-37  # about the smallest float32
    inverse = tl.where(apart, tl.rsqrt(tl.where(apart, squared, 1.0)), 0.0)
    return squared * inverse * (-1.4426950408889634 / D**0.5), inverse


@triton.jit
def forward_kernel(
    q, k, v, q_norms, k_norms, out, lse, N, T,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of rows of one map: out [M, N, D], and lse [M, N] = log₂ Σ 2^logit over the keys."""
    map, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS
    q_tile = load_rows(q + map * N * D, first, N, D, WIDTH, ROWS)
    q_norm = load_norms(q_norms + map * N, first, N, ROWS)
    highest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for start in range(0, T, COLUMNS):
        k_tile = load_rows(k + map * T * D, start, T, D, WIDTH, COLUMNS)
        v_tile = load_rows(v + map * T * D, start, T, D, WIDTH, COLUMNS)
        k_norm = load_norms(k_norms + map * T, start, T, COLUMNS)
        logits, _ = logits_in_bits(q_tile, k_tile, q_norm, k_norm, D)
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        weights = tl.exp2(logits - higher[:, None])
        rescale = tl.exp2(highest - higher)
        total = total * rescale + tl.sum(weights, axis=1)
        mixed = tl.dot(weights.to(v_tile.dtype), v_tile, mixed * rescale[:, None], input_precision="ieee")
        highest = higher
    store_rows(out + map * N * D, mixed / total[:, None], first, N, D, WIDTH, ROWS)
    rows = first + tl.arange(0, ROWS)
    tl.store(lse + map * N + rows, highest + tl.log2(total), mask=rows < N)


@triton.jit
def weights_and_pulls(x, y, x_norms, y_norms, of_x, of_y, lse, shift, D: tl.constexpr):
    """The map p, and the pull between each pair of points: the gradient of x is Σ pull·(y − x).

    x and y are q and k, of_x and of_y the output's gradient and v; for the transposed map, the other way round. With
    logits s = −r/√d and r = ‖x − y‖, the gradient of s is p·(of_x·of_y − shift), and that of r with respect to x is
    (x − y)/r. So pull = p·(of_x·of_y − shift)/(r·√d), or 0 if x equals y.
    """
    logits, inverse = logits_in_bits(x, y, x_norms, y_norms, D)
    weights = tl.exp2(logits - lse)
    return weights, weights * (product(of_x, of_y) - shift) * inverse * (1 / D**0.5)


@triton.jit
def query_backward_kernel(
    q, k, v, q_norms, k_norms, out, lse, upstream, shift, grad_q, N, T,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of rows of one map: grad_q [M, N, D], and shift [M, N] = ⟨upstream, out⟩ for the other kernel."""
    map, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    q_tile = load_rows(q + map * N * D, first, N, D, WIDTH, ROWS)
    q_norm = load_norms(q_norms + map * N, first, N, ROWS)
    upstream_tile = load_rows(upstream + map * N * D, first, N, D, WIDTH, ROWS)
    out_tile = load_rows(out + map * N * D, first, N, D, WIDTH, ROWS)
    lse_tile = tl.load(lse + map * N + rows, mask=rows < N, other=0)
    shift_tile = tl.sum(upstream_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
    tl.store(shift + map * N + rows, shift_tile, mask=rows < N)
    pulled = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, T, COLUMNS):
        k_tile = load_rows(k + map * T * D, start, T, D, WIDTH, COLUMNS)
        v_tile = load_rows(v + map * T * D, start, T, D, WIDTH, COLUMNS)
        k_norm = load_norms(k_norms + map * T, start, T, COLUMNS)
        _, pulls = weights_and_pulls(
            q_tile, k_tile, q_norm, k_norm, upstream_tile, v_tile, lse_tile[:, None], shift_tile[:, None], D
        )
        pulls = pulls.to(k_tile.dtype)
        pulled = tl.dot(pulls, k_tile, pulled, input_precision="ieee")
        total += tl.sum(pulls.to(tl.float32), axis=1)  # rounded like the product, so that near points cancel
    grad = pulled - total[:, None] * q_tile.to(tl.float32)
    store_rows(grad_q + map * N * D, grad, first, N, D, WIDTH, ROWS)


@triton.jit
def key_backward_kernel(
    q, k, v, q_norms, k_norms, lse, upstream, shift, grad_k, grad_v, N, T,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of keys of one map, which visits all feature points: grad_k and grad_v [M, T, D]."""
    map, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS
    k_tile = load_rows(k + map * T * D, first, T, D, WIDTH, ROWS)
    k_norm = load_norms(k_norms + map * T, first, T, ROWS)
    v_tile = load_rows(v + map * T * D, first, T, D, WIDTH, ROWS)
    pulled = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, N, COLUMNS):
        q_tile = load_rows(q + map * N * D, start, N, D, WIDTH, COLUMNS)
        upstream_tile = load_rows(upstream + map * N * D, start, N, D, WIDTH, COLUMNS)
        q_norm = load_norms(q_norms + map * N, start, N, COLUMNS)
        points = start + tl.arange(0, COLUMNS)
        lse_tile = tl.load(lse + map * N + points, mask=points < N, other=0)
        shift_tile = tl.load(shift + map * N + points, mask=points < N, other=0)
        weights, pulls = weights_and_pulls(
            k_tile, q_tile, k_norm, q_norm, v_tile, upstream_tile, lse_tile[None, :], shift_tile[None, :], D
        )
        pulls = pulls.to(q_tile.dtype)
        pulled = tl.dot(pulls, q_tile, pulled, input_precision="ieee")
        total += tl.sum(pulls.to(tl.float32), axis=1)
        mixed = tl.dot(weights.to(upstream_tile.dtype), upstream_tile, mixed, input_precision="ieee")
    grad = pulled - total[:, None] * k_tile.to(tl.float32)
    store_rows(grad_k + map * T * D, grad, first, T, D, WIDTH, ROWS)
    store_rows(grad_v + map * T * D, mixed, first, T, D, WIDTH, ROWS)


# ----------------------------------------------------------------------------------------------------------------------
# The launches, as operators of PyTorch: so they accept tensors without content, and their FLOP can be counted.


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """→ out [M, N, D] in the dtype of v, lse [M, N]."""
    block = tile(q)
    out, lse = empty_results(q, k, v)
    with torch.cuda.device_of(q):  # Triton launches on the current device, not on that of the tensors
        forward_kernel[triton.cdiv(q.shape[1], block["ROWS"]), len(q)](
            q, k, v, *squared_norms(q, k), out, lse, q.shape[1], k.shape[1], **block
        )
    return out, lse


def backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ the gradients of q, k and v."""
    (maps, n, _), t, block = q.shape, k.shape[1], tile(q, backward=True)
    grad_q, grad_k, grad_v = empty_gradients(q, k, v)
    norms, shift = squared_norms(q, k), torch.empty_like(lse)
    with torch.cuda.device_of(q):
        query_backward_kernel[triton.cdiv(n, block["ROWS"]), maps](
            q, k, v, *norms, out, lse, upstream, shift, grad_q, n, t, **block
        )
        key_backward_kernel[triton.cdiv(t, block["ROWS"]), maps](
            q, k, v, *norms, lse, upstream, shift, grad_k, grad_v, n, t, **block
        )
    return grad_q, grad_k, grad_v


def squared_norms(*tensors):
    """Those of each tensor's rows, [M, N or T], in float32."""
    return [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square() for x in tensors]


def empty_results(q, k, v):
    return torch.empty_like(q, dtype=v.dtype), q.new_empty(q.shape[:2], dtype=torch.float32)


def empty_gradients(q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


forward_operator = torch.library.custom_op("aurora::l2_attention", forward, mutates_args=())
backward_operator = torch.library.custom_op("aurora::l2_attention_backward", backward, mutates_args=())
forward_operator.register_fake(empty_results)
backward_operator.register_fake(empty_gradients)


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def differentiate(ctx, upstream, _):
    return backward_operator(*ctx.saved_tensors, upstream.contiguous())


forward_operator.register_autograd(differentiate, setup_context=keep)


@register_flop_formula(torch.ops.aurora.l2_attention)
def flop_of_forward(q_shape, k_shape, *_, **__):
    """Two products: the distances, and the map times v."""
    return 2 * 2 * math.prod(q_shape) * k_shape[1]


@register_flop_formula(torch.ops.aurora.l2_attention_backward)
def flop_of_backward(q_shape, k_shape, *_, **__):
    """Seven products: each kernel computes the distances and upstream·vᵀ; each of three gradients takes one more."""
    return 7 * 2 * math.prod(q_shape) * k_shape[1]


def fused_l2_attention(q, k, v):
    """attention.l2_attention_plain over [B, heads, N or T, D] with one D for all; it has no second derivative."""
    out, _ = forward_operator(*(x.flatten(0, 1).contiguous() for x in (q, k, v)))
    return out.unflatten(0, q.shape[:2])
