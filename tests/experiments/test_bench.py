"""The benchmark's cases run, and its stopwatch counts and compares."""

from types import SimpleNamespace

import pytest
import torch

from experiments import bench
from experiments.bench import Stopwatch
from tests.figures import TINY


@pytest.mark.parametrize("case", bench.CASES)
def test_every_case_runs(case, monkeypatch):
    """At tiny sizes, with a stopwatch that calls and does not measure."""
    monkeypatch.setattr(bench, "PRESETS", dict.fromkeys(("aurora-64", "emoji-gpu", "small-64"), TINY))
    monkeypatch.setattr(bench, "TRAINED", {"cpu": {"emoji-gpu": 2, "small-64": 2}})
    monkeypatch.setattr(bench, "POINTS", {"cpu": 64})
    monkeypatch.setattr(bench, "SIDES", (2, 4))
    called = SimpleNamespace(device=torch.device("cpu"), row=lambda name, function, *_: (name, function()))
    names = [name for name, _ in bench.CASES[case](called)]
    assert len(names) == len(set(names)) >= 4


def test_a_row_counts_products_and_compares_with_their_floor():
    stopwatch, a = Stopwatch(torch.device("cpu"), seconds=0), torch.randn(512, 512)
    stopwatch.side, stopwatch.operands = 512, {"fp32": a}
    *_, gflop, _, _, ratio, peak = stopwatch.row("twice", lambda: (a @ a, a @ a), "fp32").split()
    assert float(gflop) == pytest.approx(2 * 2 * 512**3 / 1e9, abs=0.01)
    assert float(ratio) > 0 and float(peak) == 2  # two results of 1 MB
