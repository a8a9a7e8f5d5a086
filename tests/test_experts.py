"""The router against its formula, and routed experts against the naive loop, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from experts import Experts
from router import Router
from tests.conftest import assert_same_gradients, double


def naive(experts, points, expert_index, gate):
    """Every point by itself through its own expert."""
    dim, outputs = points.shape[1], []
    for point, e, g in zip(points, expert_index.tolist(), gate, strict=True):
        hidden = experts.proj_in[e] @ point + experts.bias_in[e]
        a, b = hidden[: 4 * dim], hidden[4 * dim :]
        out = experts.proj_out[e] @ (a * F.gelu(b)) + experts.bias_out[e]
        outputs.append(g * out)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("num_experts", "used"), [(1, [0]), (4, [0, 1, 2, 3]), (4, [2]), (7, [1, 5])], ids=["one", "all", "single", "empty"]
)
def test_routed_experts_are_the_naive_loop(monkeypatch, num_experts, used):
    monkeypatch.setattr("experts.POINTS_AT_A_TIME", 6)
    torch.manual_seed(0)
    experts = Experts(8, num_experts).double()
    experts.bias_in.data.normal_()
    experts.bias_out.data.normal_()
    points = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(30, dtype=torch.float64, requires_grad=True)
    index = torch.tensor(used)[torch.randint(len(used), (30,))]
    inputs = [points, gate, *experts.parameters()]
    ours, oracle = experts(points, index, gate), naive(experts, points, index, gate)
    torch.testing.assert_close(ours, oracle)
    assert_same_gradients(ours, oracle, inputs)


def test_weights_begin_as_large_as_their_inputs_are_many():
    """σ = 1/√inputs; and their learning rate is scaled by the same number (the equalized learning rate)."""
    experts = Experts(64, 3)
    for name, inputs in (("proj_in", 64), ("proj_out", 256)):
        assert getattr(experts, name).std().item() == pytest.approx(inputs**-0.5, rel=0.02)
        assert experts.lr_scale[name] == pytest.approx(inputs**-0.5)


@pytest.fixture
def router():
    torch.manual_seed(0)
    return Router(dim=16, num_experts=4, w_dim=8).double()


def test_the_gate_is_the_probability_of_the_best_expert(router):
    """Values and gradients, by the formula."""
    inputs = u, w = double(3, 10, 16).requires_grad_(), double(3, 8).requires_grad_()
    routing = router(u, w)
    logits = F.leaky_relu(router.to_logits(u, w), 0.2) * 2**0.5
    probability = logits.exp() / logits.exp().sum(-1, keepdim=True)
    best = torch.tensor([[max(range(4), key=point.__getitem__) for point in image.tolist()] for image in probability])
    gate = probability.gather(-1, best[..., None])[..., 0]
    assert torch.equal(routing.expert_index, best) and len(best.unique()) == 4
    torch.testing.assert_close((routing.logits, routing.gate), (logits, gate))
    assert_same_gradients(routing.gate, gate, (*inputs, router.to_logits.weight))


def test_the_router_stays_in_float32_under_autocast(router):
    u, w = torch.randn(2, 10, 16), torch.randn(2, 8)
    router.float()
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(u, w)
    assert torch.equal(routing.logits, router(u, w).logits)
