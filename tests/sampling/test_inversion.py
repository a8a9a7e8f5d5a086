"""Fits to a picture: the perceptual distance is the definition, and it falls."""

import pytest
import torch
import torch.nn.functional as F

import sample
from sampling import inversion, latent
from sampling.pipeline import Pipeline
from weights.efficientnet import load_efficientnet


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load(device="cpu", resolution=64)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(inversion, "STEPS", 6)
    monkeypatch.setattr(inversion, "CANDIDATES", 4)


def test_the_distance_is_that_between_directions_of_features():
    """2 − 2·cosine at each point, in float64."""
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 32, 32) * 2 - 1
    distance = inversion.Perceptual(a)
    network = load_efficientnet(features_only=True).double()
    maps = (network(F.interpolate(x[None].double(), inversion.SIDE, mode="bicubic", antialias=True)) for x in (a, b))
    expected = torch.stack([(2 - 2 * F.cosine_similarity(x, y, dim=1)).mean() for x, y in zip(*maps, strict=True)])
    torch.testing.assert_close(distance(b[None])[0].double(), expected.mean(), rtol=1e-4, atol=1e-5)
    assert distance(a[None]).item() < 1e-6


def test_it_comes_nearer_to_a_picture_than_any_candidate(pipe, quick):
    target = pipe.experts("red heart", seed=7).images[0]
    few, more = (inversion.fit(pipe, target, "red heart", steps) for steps in (1, 12))
    assert more.distance < 0.9 * few.nearest and few.nearest <= few.random
    image = inversion.synthesize(pipe.generator, more.w[None], more.text.local_text).clamp(-1, 1)
    assert inversion.Perceptual(target)(image).item() == pytest.approx(more.distance, abs=1e-5)


def test_the_mean_code_of_a_prompt_is_that_of_256_latents(pipe):
    """StyleGAN-XL's truncation to the mean of a class, estimated; two prompts have one each."""
    text = torch.randn(2, pipe.generator.config.text_dim, generator=torch.Generator().manual_seed(1))
    z = torch.randn(256, pipe.generator.config.z_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = [torch.stack([pipe.generator.mapping(one[None], t[None])[0] for one in z]).mean(0) for t in text]
        torch.testing.assert_close(latent.mean_code(pipe.generator, text), torch.stack(expected))


def test_an_edit_goes_by_the_mean_codes_and_back(pipe, quick):
    fitted = inversion.fit(pipe, pipe.experts("red heart", seed=7).images[0], "red heart", 1)
    same, other = (inversion.edited(pipe, fitted, prompt) for prompt in ("red heart", "whale"))
    torch.testing.assert_close(same.w, fitted.w)
    back = inversion.edited(
        pipe, inversion.Fit(other.w, latent.read(pipe.generator, pipe.clip, ["whale"]), 0, 0, 0), "red heart"
    )
    torch.testing.assert_close(back.w, fitted.w, atol=1e-5, rtol=1e-4)


def test_the_command_shows_the_picture_its_fit_and_an_edit(run_main, tmp_path, quick):
    (picture,) = Pipeline.load(device="cpu").sample("red heart", seed=7)
    picture.save(tmp_path / "heart.png")
    arguments = ("--device", "cpu", "--out", tmp_path / "a.png", "--like")
    status, stdout, stderr = run_main(sample.main, "red heart", "blue heart", *arguments, tmp_path / "heart.png")
    assert status == 0 and "perceptual distance of 0." in stdout and "the mean" in stdout, stderr
    (tmp_path / "text.png").write_text("no picture")
    picture.crop((0, 0, 200, 256)).save(tmp_path / "wide.png")
    for name, says in (("wide.png", "is not square"), ("text.png", "cannot be used"), ("none.png", "No such file")):
        status, _, stderr = run_main(sample.main, "red heart", *arguments, tmp_path / name)
        assert status == 2 and says in stderr and stderr.count("\n") == 0
