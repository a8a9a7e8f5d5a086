"""Both stages together: pictures of a prompt, views, experts, a user's pictures."""

import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from aurora import Generator
from clip import load_minilm
from common.cli import UserError
from evaluation.enlarging import enlarged as enlarged_by
from evaluation.features import drawing
from sampling import latent
from sampling.pictures import to_bytes
from sampling.pipeline import Pipeline
from tests import figures
from upsampler import Upsampler, draw_input_noise, enlarge, given_images
from weights import generator_file


@pytest.fixture(scope="module")
def networks():
    """A base for 4×4 and 8×8, an upsampler to 16×16 and 32×32."""
    torch.manual_seed(0)
    made = Generator(figures.QUICK.generator), Upsampler(figures.LARGER.generator)
    return tuple(figures.moved(network) for network in made)


@pytest.fixture(scope="module")
def file(networks, tmp_path_factory):
    """The generator's file, with that of the upsampler beside it."""
    folder = tmp_path_factory.mktemp("stages")
    clip = types.SimpleNamespace(name="small CLIP", text=load_minilm())
    for network, name in zip(networks, ("g.safetensors", "g_upsampler.safetensors"), strict=True):
        generator_file.save_generator(folder / name, *generator_file.content(network, clip, 32, {}))
    return folder / "g.safetensors"


@pytest.fixture(scope="module")
def pipe(file):
    return Pipeline.load(file, device="cpu")


def test_the_second_stage_enlarges_what_the_first_has_drawn(networks, pipe, file):
    generator, upsampler = networks
    (picture,) = pipe.sample("red heart", seed=3)
    (small,) = Pipeline.load(file, device="cpu", resolution=8).sample("red heart", seed=3)
    assert picture.size == (32, 32) and small.size == (8, 8) and pipe.resolution == 32
    text, z = load_minilm().read(["red heart"]), latent.noise(generator, 1, seed=3)
    with torch.no_grad():
        image = generator(z, text.tokens, text.eot).image.clamp(-1, 1)
        noise = draw_input_noise(upsampler.config, 1, torch.Generator().manual_seed(0))
        output = upsampler(*given_images(upsampler.config, image, noise), z, text.tokens, text.eot)
    expected = ((output.image[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(picture) - expected).max() <= 1
    assert not torch.allclose(output.image, enlarge(enlarge(image)), atol=0.01)


def test_what_is_evaluated_is_what_is_sampled(pipe):
    """Also with truncation, which both stages have, and in several batches."""
    pictures, captions = pipe.sample("red heart", num=70, seed=3, psi=0.5), ["red heart"] * 70
    small = drawing(pipe.generator, pipe.text_encoder, 8, psi=0.5)
    large = enlarged_by(small, pipe.upsampler, pipe.text_encoder, psi=0.5)
    pixels = to_bytes(torch.cat(list(large(captions, 3)))).permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels - np.stack(pictures).astype(int)).max() <= 1


def test_an_upsampler_fits_the_text_encoder_that_the_generators_file_names(file, monkeypatch):
    """Its weights may come from another place, as on a machine without network. Another model is refused."""
    named = types.SimpleNamespace(name="all-MiniLM-L6-v2:/a/file", width=384)
    monkeypatch.setattr(generator_file, "load_text", lambda *_: named)
    assert Pipeline.load(file, device="cpu", clip="all-MiniLM-L6-v2:/a/file").upsampler
    with pytest.raises(UserError, match="reads prompts with all-MiniLM-L6-v2, not with emoji"):
        Pipeline.load(file, device="cpu", clip="emoji")


def test_a_file_of_the_wrong_stage_is_refused(file):
    beside = file.with_name("g_upsampler.safetensors")
    with pytest.raises(UserError, match="is an upsampler"):
        Pipeline.load(beside, device="cpu")
    with pytest.raises(UserError, match="is a generator; give an upsampler"):
        Pipeline.load(file, device="cpu", upsampler=file)


@pytest.fixture
def enlarged(file, tmp_path, run_main):
    """An RGBA picture → status, error and the path of what sample.py --enlarge writes."""

    def run(picture, *arguments):
        own, out = tmp_path / "own.png", tmp_path / "large.png"
        picture.save(own)
        options = ("--enlarge", own, "--checkpoint", file, "--device", "cpu", "--out", out)
        status, _, error = run_main(sample.main, "a red square", *options, *arguments)
        return status, error, out

    return run


def picture(width, height):
    """A red square on nothing."""
    image = Image.new("RGBA", (width, height))
    image.paste((255, 0, 0, 255), (width // 4, height // 4, width // 2, height // 2))
    return image


def test_the_centre_square_of_a_users_picture_is_enlarged_on_white(enlarged):
    wide, white = picture(12, 8), Image.new("RGBA", (12, 8), "white")
    square = Image.alpha_composite(white, wide).crop((2, 0, 10, 8))
    found, expected = (np.asarray(Image.open(enlarged(own)[2])) for own in (wide, square))
    assert found.shape == (32, 32, 3) and np.array_equal(found, expected)


def test_what_cannot_be_enlarged_is_one_line(enlarged):
    for (status, error, out), says in (
        (enlarged(picture(4, 4)), "give another, such as a PNG or JPEG of 8 pixels or more"),
        (enlarged(picture(8, 8), "--resolution", 8), "needs an upsampler"),
        (enlarged(picture(8, 8), "--prompts", __file__), "needs one prompt"),
    ):
        assert status == 2 and says in error and len(error.splitlines()) == 1 and not out.exists()


def test_a_users_picture_is_not_overwritten(file, tmp_path, run_main, monkeypatch):
    """For example by the default of --out, if a picture of this command is called sample.png."""
    monkeypatch.chdir(tmp_path)
    picture(8, 8).save("sample.png")
    before = Path("sample.png").read_bytes()
    arguments = ("--enlarge", tmp_path / "sample.png", "--checkpoint", file)
    status, _, error = run_main(sample.main, "a red square", *arguments)
    assert status == 2 and "--out sample.png is the picture that you gave" in error
    assert Path("sample.png").read_bytes() == before
