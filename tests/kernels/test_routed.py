"""The Triton kernels, by Triton's interpreter where there is no GPU, against the plain experts in float64."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from experts import Experts, sliced_experts

pytest.importorskip("triton")
from kernels.routed import routed_experts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors_of(dim, num_experts, index, dtype=torch.float32):
    """The arguments of routed_experts, drawn at random, as leaves."""
    torch.manual_seed(0)
    experts = Experts(dim, num_experts)
    experts.bias_in.data.normal_()
    experts.bias_out.data.normal_()
    points, gate = torch.randn(len(index), dim), torch.rand(len(index))
    stacks = [experts.proj_in, experts.bias_in, experts.proj_out, experts.bias_out]
    leaves = [x.detach().to(DEVICE, dtype).requires_grad_() for x in (points, gate, *stacks)]
    return leaves[0], index.to(DEVICE), *leaves[1:]


def plain(points, index, gate, *stacks):
    """The reference in float64 → its result, and the leaves it depends on."""
    points, gate, *stacks = leaves = [x.detach().cpu().double().requires_grad_() for x in (points, gate, *stacks)]
    return sliced_experts(points, index.cpu(), gate, *stacks), leaves


def assert_near(ours, oracle, tolerance):
    """tolerance: of each entry, and of the root mean square of all, by which sums of large terms may err."""
    scale = oracle.norm() / max(1, oracle.numel()) ** 0.5
    torch.testing.assert_close(ours.cpu().double(), oracle, rtol=tolerance, atol=tolerance * scale.item())


def assert_same_gradients(ours, oracle, leaves, oracle_leaves, tolerance):
    upstream = torch.randn_like(oracle).to(ours.dtype).to(oracle.dtype)  # rounded for both
    gradients = torch.autograd.grad(ours, [x for x in leaves if x.is_floating_point()], upstream.to(ours))
    for a, b in zip(gradients, torch.autograd.grad(oracle, oracle_leaves, upstream), strict=True):
        assert_near(a, b, tolerance)


def compare(leaves, tolerance):
    """Values and all gradients."""
    ours, (oracle, oracle_leaves) = routed_experts(*leaves), plain(*leaves)
    assert_near(ours, oracle, tolerance)
    assert_same_gradients(ours, oracle, leaves, oracle_leaves, tolerance)


@pytest.mark.parametrize(
    ("dim", "num_experts", "used"),
    [(16, 1, [0]), (16, 4, [0, 1, 2, 3]), (16, 7, [1, 5]), (24, 3, [2])],
    ids=["one", "all", "empty", "width that is no multiple of a tile"],
)
def test_kernels_are_the_plain_experts(dim, num_experts, used):
    index = torch.tensor(used)[torch.arange(37) * 5 % 11 % len(used)]
    compare(tensors_of(dim, num_experts, index), tolerance=1e-5)


def test_no_point_at_all():
    leaves = tensors_of(16, 2, torch.zeros(0, dtype=torch.long))
    compare(leaves, tolerance=0)


def assert_errs_no_more(ours, theirs, leaves, oracle, oracle_leaves):
    """In half precision an entry may be far off where large terms cancel. How far is rounding's doing, PyTorch's own
    operators show: no result or gradient may miss float64 by more than twice what theirs does at most, or on average
    by more than theirs and a quarter.
    """
    upstream = torch.randn_like(oracle).to(ours.dtype)
    learned = [x for x in leaves if x.is_floating_point()]
    gradients = [torch.autograd.grad(result, learned, upstream.to(result.device)) for result in (ours, theirs)]
    exact = torch.autograd.grad(oracle, oracle_leaves, upstream.to(oracle))
    for a, b, c in zip((ours, *gradients[0]), (theirs, *gradients[1]), (oracle, *exact), strict=True):
        our_error, their_error = (x.cpu().double() - c for x in (a, b))
        assert their_error.norm() < 0.01 * c.norm()
        assert our_error.abs().max() <= 2 * their_error.abs().max()
        assert our_error.norm() <= 1.25 * their_error.norm()


def compare_with_pytorch(leaves):
    assert_errs_no_more(routed_experts(*leaves), sliced_experts(*leaves), leaves, *plain(*leaves))


def test_half_precision_errs_no_more_than_pytorch():
    """In float16, as the interpreter multiplies no bfloat16."""
    compare_with_pytorch(tensors_of(16, 4, torch.arange(37) % 4, torch.float16))
    compare_with_pytorch(tensors_of(64, 2, torch.tensor([0] * 49 + [1]), torch.float16))  # one has a single point


def test_gradients_are_of_the_route_that_was_recomputed():
    """Gradient checkpointing runs the router again. Should it decide otherwise, all gradients go by that decision."""
    points, first, *others = tensors_of(16, 3, torch.arange(37) % 3)
    second = (torch.arange(37, device=DEVICE) % 7).clamp(max=2)
    routes = iter([first, second])
    ours = checkpoint(lambda x: routed_experts(x, next(routes), *others), points, use_reentrant=False)
    oracle, oracle_leaves = plain(points, second, *others)
    assert_same_gradients(ours, oracle, [points, *others], oracle_leaves, tolerance=1e-5)


@pytest.mark.gpu
def test_kernels_at_full_width_on_a_gpu():
    leaves = tensors_of(512, 16, torch.randint(16, (3000,)) ** 2 // 15)
    compare(leaves, 1e-4)
    compare_with_pytorch([x.detach().bfloat16().requires_grad_() if x.is_floating_point() else x for x in leaves])
