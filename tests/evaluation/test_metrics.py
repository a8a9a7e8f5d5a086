"""The Fréchet distance against scipy's matrix square root."""

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluation import metrics


def scipy_fid(a, b):
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariance_a + covariance_b - 2 * root)


def test_fid_is_scipys():
    torch.manual_seed(0)
    a = torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    b = torch.randn(400, 12, dtype=torch.float64) * 2 + 1
    assert metrics.fid(a, b) == pytest.approx(scipy_fid(a.numpy(), b.numpy()), rel=1e-9)


def test_fid_of_gaussians_is_the_closed_form():
    """Diagonal covariances: Σ (μ_a − μ_b)² + (σ_a − σ_b)²."""
    a = (torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0]).double()))
    b = (torch.tensor([0.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 1.0]).double()))
    assert metrics.frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 4)


def test_identical_sets_are_at_distance_zero_and_few_samples_do_not_break_it():
    x = torch.randn(5, 20)
    assert metrics.fid(x, x) == pytest.approx(0, abs=1e-4)
