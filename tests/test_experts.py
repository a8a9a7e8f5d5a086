"""Routed experts against the naive loop, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from experts import Experts
from tests.conftest import assert_same_gradients


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


def test_one_expert_is_a_dense_layer():
    """torch's own modules, with the same weights."""
    torch.manual_seed(0)
    experts = Experts(8, 1)
    w_in, w_out = torch.nn.Linear(8, 64), torch.nn.Linear(32, 8)
    w_in.load_state_dict({"weight": experts.proj_in[0], "bias": experts.bias_in[0]})
    w_out.load_state_dict({"weight": experts.proj_out[0], "bias": experts.bias_out[0]})
    points = torch.randn(20, 8)
    a, g = w_in(points).chunk(2, dim=-1)
    dense = w_out(a * torch.nn.GELU()(g))
    torch.testing.assert_close(experts(points, torch.zeros(20, dtype=torch.long), torch.ones(20)), dense)


def test_weights_begin_as_large_as_their_inputs_are_many():
    """σ = 1/√inputs; and their learning rate is scaled by the same number (the equalized learning rate)."""
    experts = Experts(64, 3)
    for name, inputs in (("proj_in", 64), ("proj_out", 256)):
        assert getattr(experts, name).std().item() == pytest.approx(inputs**-0.5, rel=0.02)
        assert experts.lr_scale[name] == pytest.approx(inputs**-0.5)


def test_two_experts_for_a_point_are_two_calls():
    """Rather than a silent broadcast: flattened, the choices of top-2 routing are twice as many as the points."""
    torch.manual_seed(0)
    experts, points = Experts(8, 3), torch.randn(5, 8)
    gate, expert_index = torch.rand(5, 3).topk(2)
    for chosen, weight in ((expert_index, gate), (expert_index.flatten(), gate.flatten())):
        with pytest.raises(AssertionError, match="one expert each"):
            experts(points, chosen, weight)
    both = sum(experts(points, expert_index[:, k], gate[:, k]) for k in range(2))
    torch.testing.assert_close(both, sum(naive(experts, points, expert_index[:, k], gate[:, k]) for k in range(2)))
