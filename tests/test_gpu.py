"""The commands on a GPU mix no devices. That a step never waits for it is in training/test_cuda_graph.py."""

import pytest

import evaluate
import sample
import train
from tests import figures

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("preset", ["quick", "tiny-larger"])
def test_training(run_main, tmp_path, preset):
    """It grows, and measures the FID, and whether the discriminator overfits."""
    options = ("--preset", preset, "--clip", "emoji", "--set", "fid_samples=4", "fid_every=4", "--steps", 3)
    status, _, stderr = run_main(train.main, *options, "--data", figures.folder(), "--out", tmp_path)
    assert status == 0, stderr


def test_sampling(run_main, tmp_path):
    """Every view."""
    two = "a red heart", "a blue square"
    for view in ((*two, "--num", 2), (*two, "--experts"), ("--interpolate", *two)):
        status, _, stderr = run_main(sample.main, *view, "--out", tmp_path / "picture.png")
        assert status == 0, stderr


def test_evaluation(run_main, tmp_path):
    options = ("--checkpoint", figures.generator_file(), "--data", figures.folder(), "--count", 4, "--out", tmp_path)
    status, _, stderr = run_main(evaluate.main, *options)
    assert status == 0, stderr
