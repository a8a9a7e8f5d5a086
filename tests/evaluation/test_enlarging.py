"""Enlarged pictures are compared with what they were."""

import dataclasses

import numpy as np
import torch

from clip import load_clip, load_minilm
from evaluation import enlarging
from tests import figures
from tests.conftest import assert_one_line
from upsampler import Upsampler, enlarge
from weights.generator_file import content, save_generator


def test_a_better_enlarger_is_nearer_and_the_true_pictures_are_nearest(monkeypatch):
    monkeypatch.setattr(enlarging, "efficientnet", lambda device: figures.GRID_MEANS)
    large = iter(figures.Figures(32).held_out_first(enlarging.BATCH))
    enlargers = {
        "the truth": lambda images, captions, resolution: next(large).images,
        "bicubic": enlarging.bicubic,
        "grey": lambda images, captions, resolution: torch.zeros(len(images), 3, resolution, resolution),
    }
    found = enlarging.compare(enlargers, figures.Figures(32), 16, 32, count=16)
    assert abs(found["the truth"]["perceptual"]) < 1e-6 and abs(found["the truth"]["fd"]) < 1e-2
    for measure in ("perceptual", "fd"):
        order = [found[name][measure] for name in enlargers]
        assert order == sorted(order), measure


def test_an_upsampler_enlarges_what_it_is_given_and_what_a_generator_draws():
    """One that has learned nothing interpolates."""
    torch.manual_seed(0)
    network, images = Upsampler(figures.LARGER.generator).eval().requires_grad_(False), torch.rand(3, 3, 8, 8)
    text, captions = load_minilm(), ["a", "b", "c"]
    by_network = enlarging.enlarger(network, text)
    np.testing.assert_allclose(by_network(images, captions, 32), enlarge(enlarge(images)), atol=1e-6)
    draw = enlarging.enlarged(lambda captions, seed: images.split(2), network, text)
    np.testing.assert_allclose(torch.cat(list(draw(captions, 0))), enlarge(enlarge(images)), atol=1e-6)


def test_upsamplers_of_different_sizes_are_not_compared(run_main, tmp_path):
    config = figures.LARGER.generator
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, input_resolution in zip(paths, (8, 16), strict=True):
        network = Upsampler(dataclasses.replace(config, input_resolution=input_resolution))
        save_generator(path, *content(network, load_clip("emoji"), 32, {}))
    assert_one_line(run_main(enlarging.main, *paths, "--device", "cpu"), "enlarge from or to different sizes")
