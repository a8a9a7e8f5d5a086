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
from sampling import latent, views
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


def test_other_resolutions_are_drawn(file):
    assert Pipeline.load(file, device="cpu", resolution=16).sample("whale")[0].size == (16, 16)


def test_a_file_of_the_wrong_stage_is_refused(file):
    beside = file.with_name("g_upsampler.safetensors")
    with pytest.raises(UserError, match="is an upsampler"):
        Pipeline.load(beside, device="cpu")
    with pytest.raises(UserError, match="is a generator; give an upsampler"):
        Pipeline.load(file, device="cpu", upsampler=file)


def test_every_view_draws_both_stages(pipe):
    """Each frame of the second stage is that of the same z and prompts for this stage alone."""
    for view, arguments in (
        (views.seeds_by_prompts, (["a", "b"], [1, 2], 0.5)),
        (views.interpolation, (("a", "b"), 1, 1.0, 3, "both")),
        (views.latent_walk, ("a", 1, 1.0, 4)),
    ):
        frames = pipe.view(view, *arguments)
        expected = view(pipe.upsampler, pipe.clip, *arguments)
        assert all(torch.equal(f.large.w, e.w) for f, e in zip(frames, expected, strict=True))
        assert pipe.draw(frames).images.shape[-1] == 32


def test_layers_are_mixed_through_both_stages(pipe):
    first, second = (torch.cat([frame.w, frame.large.w]) for frame in pipe.frames(["red heart", "whale"]))
    frames = views.layer_mixing(pipe, "red heart", "whale", 0, 1.0)
    assert len(frames) == len(first) + 1 == len(views.layer_names(pipe)) + 1
    for k, frame in enumerate(reversed(frames)):  # the first k layers use the first prompt, the others the second
        mixed = torch.cat([frame.w, frame.large.w])
        assert torch.equal(mixed[:k], first[:k]) and torch.equal(mixed[k:], second[k:])


def test_pictures_and_their_experts_through_the_command(file, tmp_path, run_main):
    common = ("red heart", "--checkpoint", file, "--num", 1, "--device", "cpu", "--out")
    assert run_main(sample.main, *common, tmp_path / "all.png", "--experts")[0] == 0
    assert Image.open(tmp_path / "all.png").width > 3 * 64
    status, stdout, _ = run_main(sample.main, *common, tmp_path / "small.png", "--resolution", 8)
    assert status == 0 and "8×8" in stdout
    assert run_main(sample.main, *common[:-1], "--each", tmp_path / "each")[0] == 0
    assert Image.open(tmp_path / "each" / "000000.png").size == (32, 32)


def picture(mode, size=(8, 8)):
    """A red square on nothing."""
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    return image.convert(mode)


@pytest.mark.parametrize(("mode", "size"), [("RGB", 8), ("RGBA", 8), ("RGB", 50)])
def test_a_users_picture_is_enlarged(file, tmp_path, run_main, mode, size):
    path, out = tmp_path / "own.png", tmp_path / "large.png"
    picture(mode, (size, size)).save(path)
    arguments = ("a red ❤️", "--enlarge", path, "--checkpoint", file, "--out", out, "--device", "cpu")
    status, stdout, error = run_main(sample.main, *arguments)
    assert status == 0 and "32×32" in stdout and "does not know ❤; use English words" in stdout, error
    large = Image.open(out)
    assert large.size == (32, 32) and large.mode == "RGB"
    if mode == "RGBA":  # transparent pixels are white
        Image.alpha_composite(Image.new("RGBA", (size, size), "white"), Image.open(path)).save(path)
        assert run_main(sample.main, *arguments)[0] == 0
        assert Image.open(out).tobytes() == large.tobytes()


@pytest.mark.parametrize(
    ("size", "says"),
    [((8, 10), "give a square picture of 8×8, or a larger one"), ((4, 4), "PNG or JPEG of 8 pixels or more")],
)
def test_a_picture_that_cannot_be_enlarged_is_one_line(file, tmp_path, run_main, size, says):
    picture("RGB", size).save(tmp_path / "own.png")
    arguments = ("a red square", "--enlarge", tmp_path / "own.png", "--checkpoint", file, "--device", "cpu")
    status, _, error = run_main(sample.main, *arguments, "--out", tmp_path / "large.png")
    assert status and says in error and len(error.splitlines()) == 1
    assert not (tmp_path / "large.png").exists()


@pytest.mark.parametrize("option", ["--enlarge", "--like"])
def test_a_users_picture_is_not_overwritten(file, tmp_path, run_main, monkeypatch, option):
    """For example by the default of --out, if the picture's name is sample.png."""
    monkeypatch.chdir(tmp_path)
    picture("RGB").save("sample.png")
    before = Path("sample.png").read_bytes()
    status, _, error = run_main(sample.main, "a red square", option, tmp_path / "sample.png", "--checkpoint", file)
    assert status and "--out sample.png is the picture that you gave" in error
    assert Path("sample.png").read_bytes() == before


def test_enlarging_needs_a_second_stage_and_one_caption(file, tmp_path, run_main):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(file.read_bytes())
    picture("RGB").save(tmp_path / "own.png")
    arguments = ("--enlarge", tmp_path / "own.png", "--device", "cpu", "--out", tmp_path / "large.png")
    for prompts, given, says in ((("a",), alone, "needs an upsampler"), (("a", "b"), file, "needs one prompt")):
        status, _, error = run_main(sample.main, *prompts, *arguments, "--checkpoint", given)
        assert status and says in error
    status, _, error = run_main(sample.main, "a", *arguments, "--checkpoint", file, "--resolution", 8)
    assert status and "no --resolution of the first stage" in error


def test_more_pictures_than_are_drawn_at_a_time(pipe):
    many = pipe.sample("red heart", num=latent.BATCH + 2)
    few = pipe.sample("red heart", num=2)
    assert len(many) == latent.BATCH + 2
    difference = np.abs(np.asarray(many[1], dtype=int) - np.asarray(few[1], dtype=int))
    assert difference.max() <= 1
