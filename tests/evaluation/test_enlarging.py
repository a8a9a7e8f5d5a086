"""Enlarged pictures are compared with what they were."""

import numpy as np
import torch
import torch.nn.functional as F

from clip import load_minilm
from evaluation import enlarging
from evaluation.extractors import Extractor
from tests.figures import LARGER, Figures
from upsampler import Upsampler, enlarge


class HeldOut(Figures):
    """Figures, all of which are held out."""

    def evaluation(self, batch=64, held_out=False, rank=0, world_size=1):
        assert held_out
        return super().evaluation(batch)


def test_a_better_enlarger_is_nearer_and_the_true_pictures_are_nearest(monkeypatch):
    edges = Extractor("pixels", lambda pixels: F.adaptive_avg_pool2d(pixels.double().diff().abs(), 4).flatten(1), None)
    monkeypatch.setattr(enlarging, "efficientnet", lambda device: edges)  # whose covariances take half a minute
    large = iter(HeldOut(32).evaluation(enlarging.BATCH, held_out=True))
    enlargers = {
        "the truth": lambda images, captions, resolution: next(large).images,
        "bicubic": enlarging.bicubic,
        "grey": lambda images, captions, resolution: torch.zeros(len(images), 3, resolution, resolution),
    }
    found = enlarging.compare(enlargers, HeldOut(32), 16, 32, count=16)
    assert abs(found["the truth"]["perceptual"]) < 1e-6 and abs(found["the truth"]["fd"]) < 1e-2
    for measure in ("perceptual", "fd"):
        order = [found[name][measure] for name in enlargers]
        assert order == sorted(order), measure


def test_an_upsampler_enlarges_what_it_is_given():
    """One that has learned nothing interpolates."""
    torch.manual_seed(0)
    network, images = Upsampler(LARGER.generator).eval().requires_grad_(False), torch.rand(2, 3, 8, 8)
    made = enlarging.enlarger(network, load_minilm())(images, ["a", "b"], 32)
    np.testing.assert_allclose(made, enlarge(enlarge(images)), atol=1e-6)
