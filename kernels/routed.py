"""The routed experts as Triton kernels: gather, GEGLU, second matrix product, gate and scatter, forward and backward.

experts.py defines them in plain PyTorch. Points are sorted by expert, so the rows of an expert are contiguous. They are
cut into tiles, each of a single expert; an expert without points has no tile. Every kernel multiplies one tile by its
expert's weights. It reads and writes the points at their original places, so nothing is copied into sorted order, and
the host never needs the numbers of points.

Letters: P points, C channels, H = 4C hidden, E experts. Products accumulate in float32, whatever the inputs are.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


def routed_experts(points, expert_index, gate, proj_in, bias_in, proj_out, bias_out):
    """gate · expert(point): points [P, C], expert_index [P], gate [P] and the stacks of experts.Experts → [P, C].

    Its dtype is the points', float32 or bfloat16, or autocast's.
    """
    device = points.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else points.dtype
    points, *stacks = (x.to(dtype) for x in (points, proj_in, bias_in, proj_out, bias_out))
    with torch.cuda.device_of(points):  # Triton launches on the current device, not on that of the tensors
        return RoutedExperts.apply(points, expert_index, gate.float(), *stacks)


def tile(points):
    """Constants of a launch: the sides of a tile of the result, and the depth multiplied at a time, 64 bytes of a row.

    With twice the columns or twice the depth, some kernels spill registers (tests/kernels/test_compiled.py).
    """
    if points.device.type == "cpu":  # Triton's interpreter, in a test
        return {"ROWS": 16, "COLUMNS": 16, "DEPTH": 16}
    return {"ROWS": 128, "COLUMNS": 64, "DEPTH": 64 // points.element_size(), "num_warps": 8}


class Tiles(NamedTuple):
    """The sorted order and its tiles, in int32 on the device: P // rows + E tiles, the most that may occur."""

    order: torch.Tensor  # [P], the points sorted by expert
    starts: torch.Tensor  # [E], each expert's first row in that order
    ends: torch.Tensor  # [E], the row after its last
    expert: torch.Tensor  # of each tile; E if the tile is not needed
    first_row: torch.Tensor  # of each tile


def cut(expert_index, num_experts, rows):
    """The experts of the points [P] → Tiles with `rows` rows each."""
    sorted_index, order = expert_index.sort(stable=True)
    experts = torch.arange(num_experts, device=order.device)
    ends = torch.searchsorted(sorted_index, experts, right=True)
    starts = torch.searchsorted(sorted_index, experts)
    tiles = (ends - starts + rows - 1) // rows
    tiles_until = tiles.cumsum(0)  # of this expert and all before it
    number = torch.arange(len(order) // rows + num_experts, device=order.device)
    expert = torch.searchsorted(tiles_until, number, right=True)
    its = expert.clamp(max=num_experts - 1)
    first_row = starts[its] + (number - tiles_until[its] + tiles[its]) * rows
    return Tiles(*(t.int() for t in (order, starts, ends, expert, first_row)))


@triton.jit
def expert_tile(tile, expert_ptr, first_row_ptr, ends_ptr, NUM_EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """→ the expert of a tile (NUM_EXPERTS: the tile is empty), its rows in sorted order, and which of them exist."""
    expert = tl.load(expert_ptr + tile)
    rows = tl.load(first_row_ptr + tile) + tl.arange(0, ROWS)
    end = tl.load(ends_ptr + tl.minimum(expert, NUM_EXPERTS - 1))
    return expert, rows, rows < end


@triton.jit
def gelu_and_slope(g):
    """gelu(g) = g·Φ(g), and its derivative Φ(g) + g·φ(g)."""
    cdf = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
    return g * cdf, cdf + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)


@triton.jit
def up_kernel(
    points, order, proj_in, bias_in, hidden, activated, expert_ptr, first_row_ptr, ends_ptr,
    C: tl.constexpr, H: tl.constexpr, NUM_EXPERTS: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """(a, g) = points·proj_inᵀ + bias_in → sorted activated = a·gelu(g) [P, H]; if KEEP, also hidden = (a, g)."""
    expert, rows, exist = expert_tile(tl.program_id(1), expert_ptr, first_row_ptr, ends_ptr, NUM_EXPERTS, ROWS)
    if expert == NUM_EXPERTS:
        return
    point = tl.load(order + rows, mask=exist, other=0).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    x_ptr = points + point[:, None] * C + depth[None, :]
    a_ptr = proj_in + expert.to(tl.int64) * 2 * H * C + columns[None, :] * C + depth[:, None]
    a = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    g = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, C, DEPTH):
        inside = depth + start < C
        x = tl.load(x_ptr + start, mask=exist[:, None] & inside[None, :], other=0)
        in_weights = inside[:, None] & (columns < H)[None, :]
        a = tl.dot(x, tl.load(a_ptr + start, mask=in_weights, other=0), a, input_precision="ieee")
        g = tl.dot(x, tl.load(a_ptr + H * C + start, mask=in_weights, other=0), g, input_precision="ieee")
    bias = bias_in + expert * 2 * H + columns
    a += tl.load(bias, mask=columns < H, other=0).to(tl.float32)[None, :]
    g += tl.load(bias + H, mask=columns < H, other=0).to(tl.float32)[None, :]
    inside = exist[:, None] & (columns < H)[None, :]
    row = rows.to(tl.int64)[:, None]
    if KEEP:
        tl.store(hidden + row * 2 * H + columns[None, :], a.to(hidden.dtype.element_ty), mask=inside)
        tl.store(hidden + row * 2 * H + H + columns[None, :], g.to(hidden.dtype.element_ty), mask=inside)
    value, _ = gelu_and_slope(g)
    tl.store(activated + row * H + columns[None, :], (a * value).to(activated.dtype.element_ty), mask=inside)


@triton.jit
def down_kernel(
    rows_in, order, weight, bias, gate, result, expert_ptr, first_row_ptr, ends_ptr,
    K: tl.constexpr, C: tl.constexpr, stride_column, stride_depth, NUM_EXPERTS: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sorted rows_in [P, K] times the expert's [K, C] → result [P, C] at the points' original places.

    If GATED: gate · (product + bias), the end of the forward pass. Else: the gradient of the points.
    """
    expert, rows, exist = expert_tile(tl.program_id(1), expert_ptr, first_row_ptr, ends_ptr, NUM_EXPERTS, ROWS)
    if expert == NUM_EXPERTS:
        return
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    x_ptr = rows_in + rows.to(tl.int64)[:, None] * K + depth[None, :]
    w_ptr = weight + expert.to(tl.int64) * K * C + columns[None, :] * stride_column + depth[:, None] * stride_depth
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, K, DEPTH):
        inside = depth + start < K
        x = tl.load(x_ptr + start, mask=exist[:, None] & inside[None, :], other=0)
        w = tl.load(w_ptr + start * stride_depth, mask=inside[:, None] & (columns < C)[None, :], other=0)
        total = tl.dot(x, w, total, input_precision="ieee")
    point = tl.load(order + rows, mask=exist, other=0).to(tl.int64)
    if GATED:
        total += tl.load(bias + expert * C + columns, mask=columns < C, other=0).to(tl.float32)[None, :]
        total *= tl.load(gate + point, mask=exist, other=0).to(tl.float32)[:, None]
    inside = exist[:, None] & (columns < C)[None, :]
    tl.store(result + point[:, None] * C + columns[None, :], total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def down_backward_kernel(
    upstream, order, proj_out, gate, hidden, grad_hidden, activated, grad_gate, expert_ptr, first_row_ptr, ends_ptr,
    P, C: tl.constexpr, H: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Backward through the second product and GEGLU: upstream [P, C] → sorted grad_hidden [P, 2H], and a·gelu(g) again.

    grad_gate [column tiles, P]: each tile's share of ⟨upstream·proj_out, a·gelu(g)⟩ at the points' original places.
    """
    expert, rows, exist = expert_tile(tl.program_id(1), expert_ptr, first_row_ptr, ends_ptr, NUM_EXPERTS, ROWS)
    if expert == NUM_EXPERTS:
        return
    point = tl.load(order + rows, mask=exist, other=0).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    x_ptr = upstream + point[:, None] * C + depth[None, :]
    w_ptr = proj_out + expert.to(tl.int64) * C * H + depth[:, None] * H + columns[None, :]
    grad = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, C, DEPTH):
        inside = depth + start < C
        x = tl.load(x_ptr + start, mask=exist[:, None] & inside[None, :], other=0)
        w = tl.load(w_ptr + start * H, mask=inside[:, None] & (columns < H)[None, :], other=0)
        grad = tl.dot(x, w, grad, input_precision="ieee")
    inside = exist[:, None] & (columns < H)[None, :]
    row = rows.to(tl.int64)[:, None]
    a_at = row * 2 * H + columns[None, :]
    a = tl.load(hidden + a_at, mask=inside, other=0).to(tl.float32)
    g = tl.load(hidden + a_at + H, mask=inside, other=0).to(tl.float32)
    value, slope = gelu_and_slope(g)
    tl.store(grad_gate + tl.program_id(0) * P + point, tl.sum(grad * a * value, axis=1), mask=exist)
    grad *= tl.load(gate + point, mask=exist, other=0).to(tl.float32)[:, None]
    dtype = grad_hidden.dtype.element_ty
    tl.store(grad_hidden + a_at, (grad * value).to(dtype), mask=inside)
    tl.store(grad_hidden + a_at + H, (grad * a * slope).to(dtype), mask=inside)
    tl.store(activated + row * H + columns[None, :], (a * value).to(dtype), mask=inside)


@triton.jit
def weight_gradient_kernel(
    left, right, order, gate, grad_weight, grad_bias, starts_ptr, ends_ptr,
    M: tl.constexpr, N: tl.constexpr, SORTED_LEFT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Σ over the expert's points of left [M] ⊗ right [N] → grad_weight [E, M, N]; Σ left → grad_bias [E, M].

    If SORTED_LEFT (for proj_in), left is sorted and right has the points' original order. Else (for proj_out), right is
    sorted, and left has the original order and is multiplied by the gates. An expert without points gets zeros.
    """
    expert = tl.program_id(2)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(ends_ptr + expert)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    bias = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(tl.load(starts_ptr + expert), end, DEPTH):
        rows = start + tl.arange(0, DEPTH)
        exist = rows < end
        point = tl.load(order + rows, mask=exist, other=0).to(tl.int64)
        if SORTED_LEFT:
            left_row, right_row = rows.to(tl.int64), point
        else:
            left_row, right_row = point, rows.to(tl.int64)
        x = tl.load(left + left_row[None, :] * M + m[:, None], mask=exist[None, :] & (m < M)[:, None], other=0)
        y = tl.load(right + right_row[:, None] * N + n[None, :], mask=exist[:, None] & (n < N)[None, :], other=0)
        if not SORTED_LEFT:
            x = (x * tl.load(gate + point, mask=exist, other=0)[None, :]).to(y.dtype)
        total = tl.dot(x, y, total, input_precision="ieee")
        bias += tl.sum(x.to(tl.float32), axis=1)
    at = expert.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(grad_weight + at, total.to(grad_weight.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
    if tl.program_id(0) == 0:
        tl.store(grad_bias + expert * M + m, bias.to(grad_bias.dtype.element_ty), mask=m < M)


class RoutedExperts(torch.autograd.Function):
    """The kernels in their order. The backward pass needs the inputs, the hidden (a, g) [P, 2H], and the tiles.

    (a, g) has the order of the tiles, so gradient checkpointing must recompute both or neither.
    """

    @staticmethod
    def forward(ctx, points, expert_index, gate, proj_in, bias_in, proj_out, bias_out):
        points, gate = points.contiguous(), gate.contiguous()
        (num_points, c), (num_experts, _, h) = points.shape, proj_out.shape
        block = tile(points)
        tiles = cut(expert_index, num_experts, block["ROWS"])
        where = (tiles.expert, tiles.first_row, tiles.ends)
        keep = any(ctx.needs_input_grad)
        activated = points.new_empty(num_points, h)
        hidden = points.new_empty(num_points, 2 * h) if keep else activated
        up_kernel[triton.cdiv(h, block["COLUMNS"]), len(tiles.expert)](
            points, tiles.order, proj_in, bias_in, hidden, activated, *where, c, h, num_experts, keep, **block
        )
        result = torch.empty_like(points)
        down_kernel[triton.cdiv(c, block["COLUMNS"]), len(tiles.expert)](
            activated, tiles.order, proj_out, bias_out, gate, result, *where, h, c, h, 1, num_experts, True, **block
        )
        ctx.save_for_backward(points, expert_index, gate, proj_in, bias_in, proj_out, bias_out, hidden, *tiles)
        return result

    @staticmethod
    def backward(ctx, upstream):
        points, expert_index, gate, proj_in, bias_in, proj_out, bias_out, hidden, *tiles = ctx.saved_tensors
        tiles, block, upstream = Tiles(*tiles), tile(points), upstream.contiguous()
        (num_points, c), (num_experts, _, h) = points.shape, proj_out.shape
        where = (tiles.expert, tiles.first_row, tiles.ends)
        column_tiles = triton.cdiv(h, block["COLUMNS"])
        grad_hidden, activated = torch.empty_like(hidden), points.new_empty(num_points, h)
        shares = points.new_empty(column_tiles, num_points, dtype=torch.float32)
        down_backward_kernel[column_tiles, len(tiles.expert)](
            upstream, tiles.order, proj_out, gate, hidden, grad_hidden, activated, shares, *where,
            num_points, c, h, num_experts, **block,
        )  # fmt: skip
        grad_points = torch.empty_like(points)
        down_kernel[triton.cdiv(c, block["COLUMNS"]), len(tiles.expert)](
            grad_hidden, tiles.order, proj_in, bias_out, gate, grad_points, *where, 2 * h, c, 1, c, num_experts, False,
            **block,
        )  # fmt: skip
        grad_in, grad_bias_in = torch.empty_like(proj_in), torch.empty_like(bias_in)
        grad_out, grad_bias_out = torch.empty_like(proj_out), torch.empty_like(bias_out)
        for left, right, weight, bias, sorted_left in (
            (grad_hidden, points, grad_in, grad_bias_in, True),
            (upstream, activated, grad_out, grad_bias_out, False),
        ):
            m, n = weight.shape[1:]
            weight_gradient_kernel[triton.cdiv(n, block["COLUMNS"]), triton.cdiv(m, block["ROWS"]), num_experts](
                left, right, tiles.order, gate, weight, bias, tiles.starts, tiles.ends, m, n, sorted_left, **block
            )
        of_bias = (upstream @ bias_out.T).gather(1, expert_index[:, None])[:, 0]
        grad_gate = (shares.sum(0) + of_bias).to(gate.dtype)
        return grad_points, None, grad_gate, grad_in, grad_bias_in, grad_out, grad_bias_out
