"""The work of additive attention grows with the number of points, that by distance with its square."""

import pytest
import torch
from PIL import Image

from experiments import attention_cost


def test_work_is_counted_by_the_formulas():
    attentions, dim = attention_cost.networks()
    for side in (8, 16):
        n, heads = side**2, 4
        by_distance, additive = (
            attention_cost.measure(network, torch.randn(1, n, dim))[0] for network in attentions.values()
        )
        products = 2 * n * n * (dim + 2 * heads) + 2 * n * n * dim  # distances, and weights times values
        assert 1e9 * by_distance == pytest.approx(products + 8 * n * dim**2, rel=0.02)
        assert 1e9 * additive == pytest.approx(8 * n * dim**2, rel=0.02)  # four projections


def test_the_command_prints_a_table_and_draws_it(tmp_path, monkeypatch, run_main):
    monkeypatch.setattr(attention_cost, "SIDES", (8, 16))
    status, said, error = run_main(attention_cost.main, "--out", tmp_path / "attention.png")
    assert status == 0 and said.count("| additive |") == 2, error
    assert Image.open(tmp_path / "attention.png").width > 1000
    assert run_main(attention_cost.main, "--out", "/proc/none/attention.png")[0] == 2
