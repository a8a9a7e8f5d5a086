"""Attention against its formula, and the memory it takes."""

import gc
import itertools

import pytest
import torch

import attention
from tests.conftest import assert_same_gradients, double

torch.manual_seed(0)


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


def peak_memory(function):
    """The peak bytes of PyTorch's CPU allocator during a call, minus those before."""
    gc.collect()  # otherwise older garbage may be freed during the call
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


def test_memory_in_training_is_linear_in_the_points(monkeypatch):
    monkeypatch.setitem(attention.MAP_ENTRIES, "cpu", 2**14)

    def forward_and_backward(points):
        leaves = [torch.randn(1, 1, points, 64, requires_grad=True) for _ in range(3)]
        upstream = torch.randn(1, 1, points, 64)
        return peak_memory(lambda: torch.autograd.grad(attention.l2_attention(*leaves), leaves, upstream))

    small, middle, large = (forward_and_backward(side**2) for side in (8, 16, 32))
    assert small < middle < 4 * small and middle < large < 4 * middle
