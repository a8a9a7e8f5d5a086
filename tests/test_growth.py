"""The reference FID and the generator's against their definitions, and when a resolution is left."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import growth
from clip import load_clip
from data.sources import Batch
from growth import Growth
from sampling import latent
from tests import figures
from tests.evaluation.test_features import by_ranks
from tests.figures import LARGER, TINY
from weights.generator_file import load_generator

RECIPE = dataclasses.replace(TINY.recipe, fid_samples=5)


def distance(a, b):
    """The Fréchet distance between features [N, D] and [M, D] in NumPy: tr (Σ_a Σ_b)^½ is a nuclear norm."""
    (mean_a, a), (mean_b, b) = ((x.mean(0), (x - x.mean(0)) / np.sqrt(len(x) - 1)) for x in (a, b))
    trace = (a**2).sum() + (b**2).sum() - 2 * np.linalg.norm(a @ b.T, "nuc")
    return ((mean_a - mean_b) ** 2).sum() + trace


class Spread:
    """In the place of a CLIP: features that change with the resolution."""

    device = torch.device("cpu")

    def encode_image(self, images):
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


class Pictures:
    """A source of random images of 16×16, in batches of up to four."""

    images = torch.randn(14, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def held_out_first(self, rank, world_size, count):
        mine = list(range(rank, count, world_size))
        for first in range(0, len(mine), 4):
            part = mine[first : first + 4]
            yield Batch(self.images[part], [f"picture {i}" for i in part], {})


def features_at(images, resolution):
    pixels = images.double().unflatten(2, (resolution, -1)).unflatten(4, (resolution, -1)).mean((3, 5)).numpy()
    return np.concatenate([pixels.mean((2, 3)), pixels.std((2, 3), ddof=1)], 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_reference_is_between_two_disjoint_sets_at_each_resolution(monkeypatch, ranks):
    """Each rank reads its own images alone, and all have the result of all. The second stage is given small images."""

    def work():
        return Growth(RECIPE, [4, 8], Spread(), 0, LARGER.generator).compute_reference(Pictures())

    order = [number for rank in range(ranks) for number in range(rank, 10, ranks)]
    images, other = Pictures.images[order[:5]], Pictures.images[order[5:]]
    for kept in by_ranks(monkeypatch, ranks, work):
        assert kept["captions"] == [f"picture {i}" for i in order[:5]]
        torch.testing.assert_close(kept["given"][0], F.avg_pool2d(images, 2))
        for resolution in (4, 8):
            features, others = features_at(images, resolution), features_at(other, resolution)
            mean, covariance = kept["statistics"][resolution]
            np.testing.assert_allclose(mean, others.mean(0), rtol=1e-4)
            np.testing.assert_allclose(covariance, np.cov(others.T), rtol=1e-3, atol=1e-6)
            assert kept["reference_fid"][resolution] == pytest.approx(distance(features, others), rel=1e-3)


def test_a_rank_sends_an_upsamplers_inputs_once():
    _, _, given = Growth(RECIPE, [4, 8], Spread(), 0, LARGER.generator).measure_share(Pictures())
    content = sum(x.nbytes for batch in given for x in batch)
    assert content == 10 * 2 * 3 * 8 * 8 * 4 and len(pickle.dumps(given)) < 1.5 * content


def test_a_reference_of_other_samples_or_that_is_damaged_is_measured_again(tmp_path):
    path, made = tmp_path / "reference.pt", []
    for samples, damaged in ((5, False), (5, False), (6, False), (6, True)):
        if damaged:
            path.write_bytes(b"damaged")
        recipe = dataclasses.replace(RECIPE, fid_samples=samples)
        growth = Growth(recipe, [4], Spread(), seed=0)
        growth.phase.best_fid = 7.0
        growth.measure_reference(Pictures(), path)
        made.append((path.stat().st_mtime_ns, growth.phase.best_fid))
    (first, _), *others = made
    assert others[0] == (first, 7) and len(set(made)) == 3
    assert [best_fid for _, best_fid in made] == [7, 7, float("inf"), 7]  # a FID of other samples means nothing


def test_the_fid_is_of_the_generators_output_at_the_active_resolution():
    generator, clip = load_generator(figures.generator_file())[0], load_clip("emoji")
    captions = [f"{color} circle" for color in ("red", "green", "blue", "pink", "black")]
    measured = Growth(RECIPE, [4, 8, 16, 32], clip, seed=3)
    measured.phase.number, measured.captions, measured.given = 1, captions, ()
    for level in generator.synthesis.levels:
        for parameter in level.to_rgb.parameters():
            parameter *= 3  # so that there is something to cut
    text = clip.read(captions)
    image = generator(latent.noise(generator, 5, seed=3), text.tokens, text.eot, 8).image
    assert image.shape[-1] == 8 and image.abs().max() > 1
    fake = clip.encode_image(image.clamp(-1, 1)).double().numpy()
    real = {r: np.random.default_rng(r).normal(size=(9, fake.shape[1])) for r in (4, 8)}
    measured.statistics = {r: (torch.tensor(x.mean(0)), torch.tensor(np.cov(x.T))) for r, x in real.items()}
    measured.reference_fid = {r: float(r) for r in real}
    report = measured.evaluate(generator)
    assert report["reference_fid"] == 8 and report["fid"] == pytest.approx(distance(fake, real[8]), rel=1e-4)


def test_the_best_fid_is_kept_and_evaluations_since_are_counted(monkeypatch):
    measured = Growth(RECIPE, [4, 8], None, seed=0)
    measured.captions, measured.statistics, measured.reference_fid = [], {4: None}, {4: 1.0}
    measured.given = ()
    monkeypatch.setattr(growth, "extract_fake_features", lambda *_: torch.zeros(2, 2))
    for value, best, since in ((5, 5, 0), (3, 3, 0), (4, 3, 1), (3, 3, 2), (2, 2, 0)):
        monkeypatch.setattr(growth, "frechet_distance", lambda *_, value=value: float(value))
        assert measured.evaluate(None)["fid"] == value
        assert (measured.phase.best_fid, measured.phase.evaluations_since_best) == (best, since)


def test_a_phase_ends_at_the_reference_fid_or_when_it_stops_falling_or_by_its_images():
    recipe = dataclasses.replace(RECIPE, fid_factor=1.5, images_per_phase={4: 100})
    measured = Growth(recipe, [4, 8], clip=None, seed=0)
    measured.reference_fid, phase = {4: 1.0}, measured.phase
    for images, fid, since, reason in (
        (99, 1.51, growth.PATIENCE - 1, None),
        (99, 1.49, 0, "it is near the reference"),
        (99, 1.51, growth.PATIENCE, "it stopped falling"),
        (100, 1.51, 0, "it has seen its share of images"),
    ):
        phase.images, phase.best_fid, phase.evaluations_since_best = images, fid, since
        assert measured.reason_to_grow() == reason
    phase.images, phase.best_fid, phase.evaluations_since_best = 100, 0.5, growth.PATIENCE
    measured.grow()
    assert measured.active == [4, 8] and measured.reason_to_grow() is None
    assert measured.phase == growth.Phase(1)  # its FID and its images are counted anew
