"""What the experts know: the formulas, on cases whose answer is known."""

import math

import pytest
import torch

from experiments import probe
from tests import figures


def test_information_of_equal_of_independent_and_of_noisy_labels():
    """Equal: the entropy. Independent: nothing. A binary channel that flips a quarter: 1 − H(1/4)."""
    a = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert probe.mutual_information(a, a) == pytest.approx(2)
    assert probe.mutual_information(a, torch.tensor([0, 1] * 4)) == pytest.approx(0)
    sent, received = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
    entropy = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert probe.mutual_information(sent, received) == pytest.approx(1 - entropy)


def test_the_mask_is_where_a_picture_is_not_white():
    images = torch.ones(2, 3, 8, 8)
    images[0, 2, 2:4, 4:8] = -1.0  # yellow
    images[1] = 0.9  # nearly white
    assert probe.object_mask(images, 4).tolist() == [[int(i in (6, 7)) for i in range(16)], [0] * 16]


def test_the_demos_answer_is_printed(run_main):
    _, stdout, _ = run_main(probe.main, "--count", 2)
    for words in ("at 8.0.0", "shuffled", "entropy of the object"):
        assert words in stdout


def test_a_model_without_experts_is_refused(run_main):
    status, _, error = run_main(probe.main, "--checkpoint", figures.generator_file(4))
    assert status == 2 and "has no experts" in error
