"""The experts' kernels, in Triton's interpreter if there is no GPU, against the plain experts in float64."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from experts import Experts, sliced_experts

pytest.importorskip("triton")
from kernels.routed import routed_experts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors_of(dim, num_experts, index, dtype=torch.float32):
    """Random arguments of routed_experts, as leaves."""
    torch.manual_seed(0)
    experts = Experts(dim, num_experts)
    experts.bias_in.data.normal_()
    experts.bias_out.data.normal_()
    points, gate = torch.randn(len(index), dim), torch.rand(len(index))
    stacks = [experts.proj_in, experts.bias_in, experts.proj_out, experts.bias_out]
    leaves = [x.detach().to(DEVICE, dtype).requires_grad_() for x in (points, gate, *stacks)]
    return leaves[0], index.to(DEVICE), *leaves[1:]


def compute(function, leaves):
    """→ the result of a function, and its gradients with respect to all leaves except integers."""
    result = function(*leaves)
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).bfloat16()  # exact in all dtypes
    learned = [x for x in leaves if x.is_floating_point()]
    return [result, *torch.autograd.grad(result, learned, upstream.to(result))]


def compute_exactly(function, leaves):
    """`compute` in float64 on the CPU."""
    leaves = [x.detach().cpu().double().requires_grad_() if x.is_floating_point() else x.cpu() for x in leaves]
    return compute(function, leaves)


def assert_near(ours, exact, tolerance):
    """tolerance: of each entry, and of the root mean square of all entries, as sums of large terms may cancel."""
    for a, b in zip(ours, exact, strict=True):
        scale = b.norm() / max(1, b.numel()) ** 0.5
        torch.testing.assert_close(a.cpu().double(), b, rtol=tolerance, atol=tolerance * scale.item())


def compare(fused, plain, leaves, tolerance):
    assert_near(compute(fused, leaves), compute_exactly(plain, leaves), tolerance)


def compare_in_half_precision(fused, plain, leaves):
    """An entry may be far off if large terms cancel. So PyTorch's operators, in the same precision, give the limit: no
    result or gradient may err by more than twice their largest error, or by 1.25 of theirs on average.
    """
    outputs = compute(fused, leaves), compute(plain, leaves), compute_exactly(plain, leaves)
    for ours, theirs, exact in zip(*outputs, strict=True):
        our_error, their_error = (x.cpu().double() - exact for x in (ours, theirs))
        assert their_error.norm() < 0.01 * exact.norm()
        assert our_error.abs().max() <= 2 * their_error.abs().max()
        assert our_error.norm() <= 1.25 * their_error.norm()


@pytest.mark.parametrize(
    ("dim", "num_experts", "used"),
    [(16, 1, [0]), (16, 4, [0, 1, 2, 3]), (16, 7, [1, 5]), (24, 3, [2])],
    ids=["one", "all", "empty", "width that is no multiple of a tile"],
)
def test_kernels_are_the_plain_experts(dim, num_experts, used):
    index = torch.tensor(used)[torch.arange(37) * 5 % 11 % len(used)]
    compare(routed_experts, sliced_experts, tensors_of(dim, num_experts, index), tolerance=1e-5)


@pytest.mark.parametrize(
    ("dim", "num_experts", "index"), [(16, 4, torch.arange(37) % 4), (32, 2, torch.tensor([0] * 20 + [1]))]
)
def test_half_precision_errs_no_more_than_pytorch(dim, num_experts, index):
    """In float16, as the interpreter cannot multiply bfloat16. An expert may have a single point."""
    compare_in_half_precision(routed_experts, sliced_experts, tensors_of(dim, num_experts, index, torch.float16))


def test_gradients_are_of_the_route_that_was_recomputed():
    """Gradient checkpointing runs the router again. All gradients must follow its second decision."""
    points, first, *others = tensors_of(16, 3, torch.arange(37) % 3)
    second = (torch.arange(37, device=DEVICE) % 7).clamp(max=2)
    routes = iter([first, second])

    def checkpointed(points, _, *others):
        return checkpoint(lambda x: routed_experts(x, next(routes), *others), points, use_reentrant=False)

    _, *gradients = compute(checkpointed, (points, first, *others))
    assert_near(gradients, compute_exactly(sliced_experts, (points, second, *others))[1:], tolerance=1e-5)


@pytest.mark.gpu
def test_kernels_at_full_width_on_a_gpu():
    leaves = tensors_of(512, 16, torch.randint(16, (3000,)) ** 2 // 15)
    compare(routed_experts, sliced_experts, leaves, 1e-4)
    leaves = [x.detach().bfloat16().requires_grad_() if x.is_floating_point() else x for x in leaves]
    compare_in_half_precision(routed_experts, sliced_experts, leaves)
