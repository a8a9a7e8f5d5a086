"""What the experts know, and how even paths are: the formulas, on cases whose answer is known."""

import math
import sys

import pytest
import torch

from data.scenes import render
from evaluation.judge import scenes_with
from experiments import probe


def test_information_of_equal_of_independent_and_of_noisy_labels():
    """Equal: the entropy. Independent: nothing. A binary channel that flips a quarter: 1 − H(1/4)."""
    a = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert probe.mutual_information(a, a) == pytest.approx(2)
    assert probe.mutual_information(a, torch.tensor([0, 1] * 4)) == pytest.approx(0)
    sent, received = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
    entropy = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert probe.mutual_information(sent, received) == pytest.approx(1 - entropy)


def test_the_mask_of_a_rendered_scene_is_where_its_object_is():
    for scene in filter(probe.is_plain, scenes_with(1, 30)):
        o = scene.objects[0]
        mask = probe.object_mask(render([scene], 64)[0], scene, 64).view(64, 64)
        y, x = mask.nonzero().float().mean(0) / 64
        assert abs(x - o.x) < 0.05 and abs(y - o.y) < 0.08  # a triangle's centre of mass is lower than its centre
        assert 0 < mask.float().mean() < math.pi * (1.15 * o.radius) ** 2


def test_the_demos_answer_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["probe.py", "--count", "6"])
    probe.main()
    said = capsys.readouterr().out
    for words in (
        "at 8.0.0",
        "shuffled",
        "what there is to know",
        "text, spherical",
        "noise, linear",
        "times the mean",
    ):
        assert words in said
