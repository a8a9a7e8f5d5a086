"""Attention against its formula, and what it keeps in memory."""

import pytest
import torch

import attention
from tests.conftest import assert_same_gradients, double


@pytest.mark.parametrize("block", [2**20, 2500, 130, 7], ids=["whole", "two heads", "four rows", "one row"])
def test_l2_attention_is_its_formula(monkeypatch, block):
    """Values and gradients, also where a map is computed in blocks."""
    monkeypatch.setitem(attention.MAP_ENTRIES, "cpu", block)
    q, k, v = inputs = [t.requires_grad_() for t in (double(2, 3, 40, 8), double(2, 3, 30, 8), double(2, 3, 30, 5))]
    expected = attention.l2_attention_plain(q, k, v)
    ours = attention.l2_attention(q, k, v)
    torch.testing.assert_close(ours, expected)
    assert_same_gradients(ours, expected, inputs)


def test_points_that_meet_have_a_finite_gradient():
    q = double(1, 1, 4, 3).requires_grad_()
    assert torch.autograd.grad(attention.l2_attention(q, q, q).square().sum(), q)[0].isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-3)], ids=str)
def test_near_points_far_from_the_origin_keep_their_distances(dtype, tolerance):
    """At norms twenty times their distances, where a norm rounded to one bfloat16 would be off by 0.2 of them."""
    q, k = ((4 + 0.2 * torch.randn(1, 1, 50, 32)).to(dtype) for _ in range(2))
    v = torch.eye(50)[None, None].to(dtype)
    ours = attention.l2_attention(8 * q, 8 * k, v).double()
    assert ours.sub(attention.l2_attention_plain(8 * q.double(), 8 * k.double(), v.double())).abs().max() < tolerance


def test_training_keeps_no_map(monkeypatch):
    """It is computed again in the backward pass; with 1,024 points it would have a million entries."""
    monkeypatch.setitem(attention.MAP_ENTRIES, "cpu", 2**14)
    q, k, v = (torch.randn(1, 1, 1024, 8, requires_grad=True) for _ in range(3))
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attention.l2_attention(q, k, v)
    assert sum(kept.values()) < 2**20
