"""The router chooses by feature point and by w."""

import pytest
import torch

from router import Router


@pytest.fixture
def router():
    torch.manual_seed(0)
    return Router(dim=16, num_experts=4, w_dim=8)


def test_w_alone_changes_routes(router):
    u, w = torch.randn(1, 64, 16), torch.randn(2, 8) * 3
    first, second = (router(u, code[None]).expert_index for code in w)
    assert 0 < (first != second).float().mean() < 1


def test_the_feature_point_alone_changes_routes(router):
    assert len(router(torch.randn(1, 64, 16), torch.randn(1, 8)).expert_index.unique()) == 4


def test_the_gate_is_the_chosen_probability(router):
    routing = router(torch.randn(3, 10, 16), torch.randn(3, 8))
    probability = routing.logits.double().exp() / routing.logits.double().exp().sum(-1, keepdim=True)
    best = torch.tensor([[max(range(4), key=point.__getitem__) for point in image.tolist()] for image in probability])
    assert torch.equal(routing.expert_index, best)
    torch.testing.assert_close(routing.gate.double(), probability.gather(-1, best[..., None])[..., 0])


def test_gradients_reach_the_router_and_w(router):
    w = torch.randn(2, 8, requires_grad=True)
    router(torch.randn(2, 10, 16), w).gate.sum().backward()
    assert w.grad.abs().sum() > 0 and router.to_logits.weight.grad.abs().sum() > 0


def test_it_stays_in_float32_under_autocast(router):
    u, w = torch.randn(2, 10, 16), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(u, w)
    assert torch.equal(routing.logits, router(u, w).logits)
