"""The Fréchet distance against scipy's matrix square root, and R-precision against its definition."""

import numpy as np
import pytest
import scipy.linalg
import torch

from common.cli import UserError
from evaluation import metrics


def test_fid_is_scipys():
    torch.manual_seed(0)
    a = torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    b = torch.randn(400, 12, dtype=torch.float64) * 2 + 1
    covariance_a, covariance_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    expected = (a.mean(0) - b.mean(0)).square().sum() + np.trace(covariance_a + covariance_b - 2 * root)
    assert metrics.fid(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_equal_sets_are_at_distance_zero_also_if_they_are_few_and_are_refused():
    x = torch.randn(5, 20)
    assert metrics.fid(x, x) == pytest.approx(0, abs=1e-4)
    with pytest.raises(UserError, match="are the same"):
        metrics.compare_images(x, x)


def test_the_distance_between_halves_is_between_different_images():
    """The distance of a set to itself would be zero."""
    x = torch.cat([torch.zeros(4, 3), torch.ones(4, 3), 9 * torch.ones(1, 3)])  # the ninth is in neither half
    assert metrics.fid_of_halves(x) == pytest.approx(3)


def test_r_precision_is_the_definition():
    """With all other captions as candidates."""
    rng, expected = np.random.default_rng(0), []
    words = [f"caption {i % 30}" for i in range(40)]  # ten of them twice
    texts = rng.normal(size=(30, 4))[[i % 30 for i in range(40)]]
    images = texts + 0.7 * rng.normal(size=(40, 4))
    for image, own, word in zip(images, texts, words, strict=True):

        def cosine(text, image=image):
            return float(image @ text / np.linalg.norm(image) / np.linalg.norm(text))

        others = [cosine(text) for text, other in zip(texts, words, strict=True) if other != word]
        expected.append(all(cosine(own) > other for other in others))
    assert 5 < sum(expected) < 35
    found = metrics.own_caption_first(torch.from_numpy(images), torch.from_numpy(texts), words, block=7)
    assert found.tolist() == expected


def test_r_precision_asks_for_one_of_a_hundred():
    """Images that fit all captions alike are right in one of `candidates` cases; ties are not right."""
    rng = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(900, 16, generator=rng) for _ in range(2))
    captions = [str(i) for i in range(900)]
    for candidates in (4, 20):
        share = metrics.own_caption_first(images, texts, captions, candidates).float().mean().item()
        assert share == pytest.approx(1 / candidates, abs=0.04)
    assert metrics.own_caption_first(images, texts, captions).float().mean().item() == pytest.approx(0.01, abs=0.003)
    assert metrics.own_caption_first(texts, texts, captions).all()
    assert not metrics.own_caption_first(texts, texts[:1].expand(900, -1), captions).any()
