"""The kernels of L2 attention, in Triton's interpreter if there is no GPU, against the formula in float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attention import l2_attention_plain, merge_heads
from training.plan import FlopCounter

pytest.importorskip("triton")
from kernels.l2_attention import forward_operator, fused_l2_attention
from tests.kernels.test_routed import DEVICE, compare, compare_in_half_precision


def tensors_of(batch, heads, n, t, d, scale=1.0, offset=0.0, dtype=torch.float32):
    """q, k and v as split_heads makes them, not contiguous."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, length, heads, d).transpose(1, 2) for length in (n, t, t))
    return [x.to(DEVICE, dtype).requires_grad_() for x in (scale * q + offset, scale * k + offset, v)]


def fused(*leaves):
    return merge_heads(fused_l2_attention(*leaves))


def plain(*leaves):
    return merge_heads(l2_attention_plain(*leaves))


@pytest.mark.parametrize(
    ("sizes", "scale", "tolerance"),
    [
        pytest.param((1, 2, 37, 37, 32), 1, 1e-5, id="self"),
        pytest.param((2, 1, 21, 76, 24), 1, 1e-5, id="cross, a width that is no power of two"),
        pytest.param((1, 1, 19, 40, 16), 1e-15, 1e-5, id="tiny distances"),
        # A logit of a thousand has an error of 1e-4 in float32, and so has its exponential.
        pytest.param((1, 1, 19, 40, 16), 300, 1e-4, id="large distances"),
    ],
)
def test_kernels_are_the_formula(sizes, scale, tolerance):
    compare(fused, plain, tensors_of(*sizes, scale), tolerance)


def test_a_distance_of_zero_has_no_gradient():
    """Squares of four entries ±1 are exact in float32, so distances become exactly zero."""
    *_, v = tensors_of(1, 1, 23, 23, 4)
    q = torch.randn_like(v).sign().requires_grad_()
    compare(fused, plain, [q, q.detach().clone().requires_grad_(), v], tolerance=1e-5)


@pytest.mark.parametrize("sizes", [(1, 2, 37, 76, 24), (1, 1, 40, 40, 32, 0.2, 4.0)], ids=["", "far from the origin"])
def test_half_precision_errs_no_more_than_pytorch(sizes):
    """In float16, as the interpreter cannot multiply bfloat16. Far from the origin large terms cancel."""
    compare_in_half_precision(fused, plain, tensors_of(*sizes, dtype=torch.float16))


def test_the_operators_declarations_are_true():
    """They write to no input, and their results for tensors without content have the same shapes."""
    q, k, v = (x.detach().flatten(0, 1).contiguous().requires_grad_() for x in tensors_of(1, 2, 7, 5, 16))
    torch.library.opcheck(forward_operator, (q, k, v), test_utils=("test_schema", "test_faketensor"))


def test_products_are_counted_with_and_without_content():
    """Two forward; seven backward, as each of two kernels computes the distances and upstream·vᵀ again."""

    def count(dtype):
        with FlopCounter() as counter:
            leaves = [torch.ones(1, 2, n, 24, dtype=dtype, device=DEVICE, requires_grad=True) for n in (5, 7, 7)]
            fused_l2_attention(*leaves).sum().backward()
        assert [x.grad.shape for x in leaves] == [x.shape for x in leaves]
        return counter.by_dtype

    expected = (2 + 7) * 2 * 2 * 5 * 7 * 24
    assert count(torch.float32) == {torch.float32: expected}
    with FakeTensorMode():
        assert count(torch.bfloat16) == {torch.bfloat16: expected}


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1, 2, 700, 700, 64), (2, 4, 1000, 76, 64)])
def test_kernels_at_full_width_on_a_gpu(sizes):
    compare(fused, plain, tensors_of(*sizes), 1e-4)
    compare_in_half_precision(fused, plain, tensors_of(*sizes, dtype=torch.bfloat16))
