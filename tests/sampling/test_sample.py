"""Sampling as people use it, and the mistakes they make."""

import functools
import subprocess
import sys

import pytest
import torch
from PIL import Image, ImageColor

import sample
from clip import MODELS
from sampling import latent, pictures, views
from tests import ROOT, figures
from tests.conftest import assert_one_line


@pytest.fixture
def run(run_main):
    """sample.py with arguments → exit status, stdout, stderr."""
    return functools.partial(run_main, sample.main, "--checkpoint", figures.generator_file())


def test_the_first_picture(tmp_path):
    """The README's command, on the demo model, in a fresh process."""
    command = [sys.executable, "sample.py", "red heart", "--out", tmp_path / "a.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "256×256" in done.stdout, done.stderr
    picture = Image.open(tmp_path / "a.png")
    assert picture.width > 4 * 128 and picture.height > 128


@torch.no_grad()
def test_truncation_goes_toward_the_prompts_own_mean(demo):
    generator, clip = demo
    text, z = latent.read(generator, clip, ["a red square", "a blue cross"]).global_text, latent.noise(generator, 2, 1)
    w, mean = generator.mapping(z, text), latent.mean_code(generator, text)
    for psi in (0.0, 0.5, 1.0):
        torch.testing.assert_close(latent.codes(generator, z, text, psi), mean + psi * (w - mean))
    assert not torch.allclose(*mean)


def test_prompts_of_a_file_and_unusual_ones_are_drawn_and_explained(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue star 🐉\n", encoding="utf-8")
    out = tmp_path / "new folder" / "a.png"
    status, stdout, stderr = run("word " * 100, "--prompts", tmp_path / "prompts.txt", "--num", 2, "--out", out)
    assert status == 0 and "6 pictures" in stdout and out.is_file(), stderr
    assert "too long" in stdout and "does not know 🐉" in stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "nothing to draw"),
        (("x", "--checkpoint", "/missing.safetensors"), "no generator at"),
        (("x", "--checkpoint", MODELS / "judge_clip.safetensors"), "of Aurora; give the generator_ema.safetensors"),
        (("--interpolate", "x", "y", "--steps", "1"), "interpolation needs both ends"),
        (("z", "--interpolate", "x", "y"), "its own two prompts"),
        (("x", "--prompts", "/missing.txt"), "error: /missing.txt: No such"),
        (("x", "--out", "picture.xyz"), "unknown picture format"),
        (("x", "y", "--num", "501"), "1002 pictures are too many for one file"),
        (("x", "--each", "new folder", "--experts"), "leave it out with --each and --enlarge"),
        (("x", "--enlarge", "a.png", "--truncation", "0.5"), "no effect on --enlarge"),
        (("x", "--device", "abacus"), "use auto, cpu, cuda"),
    ],
)
def test_mistakes_are_one_line(run, arguments, says):
    assert_one_line(run(*arguments), says)


def test_prompts_are_rows_and_an_interpolation_is_one_row(run, tmp_path):
    out = tmp_path / "a.png"
    for arguments, columns, rows in (
        (("a red circle", "a blue star", "--num", 3), 3, 2),
        (("a red circle", "a blue star", "--num", 20), 10, 4),
        (("--interpolate", "a red circle", "a large blue star", "--steps", 5), 5, 1),
    ):
        assert run(*arguments, "--out", out)[0] == 0
        picture = Image.open(out)
        assert picture.width == columns * (pictures.CELL + pictures.MARGIN) + pictures.MARGIN
        assert picture.height // pictures.CELL == rows


def test_a_gif_has_a_frame_for_each_step_and_maps_beside_the_picture(run, tmp_path):
    out = tmp_path / "a.gif"
    assert run("--interpolate", "a red circle", "a blue star", "--steps", 6, "--experts", "--out", out)[0] == 0
    picture = Image.open(out)
    assert picture.n_frames == 6 and picture.width > 2 * pictures.CELL


@torch.no_grad()
def test_between_two_prompts_all_or_a_part_of_the_text_changes(demo):
    generator, clip = demo
    prompts = ["a large red circle on a white background", "a small blue star on a black background"]
    start, end = (latent.read(generator, clip, [prompt]) for prompt in prompts)
    halfway = latent.Prompt(*(views.between(a, b, 0.5) for a, b in zip(start, end, strict=True)))
    for part, local in (("both", (start, halfway, end)), ("global", (start, start, start))):
        found = views.between_prompts(start, end, [0, 0.5, 1], part)
        expected = torch.cat([x.global_text for x in (start, halfway, end)]), torch.cat([x.local_text for x in local])
        torch.testing.assert_close(tuple(found), expected, rtol=1e-3, atol=1e-4)


def test_the_arc_between_two_directions():
    """Halfway between (2, 0) and (0, 4) lies 45°, at the mean length 3."""
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    torch.testing.assert_close(views.between(a, b, 0.5), torch.tensor([[3.0, 3.0]]) / 2**0.5)


def test_an_expert_map_has_the_routes_colors_in_place():
    routes = torch.tensor([0, 1, 2, 3])
    seen = pictures.expert_map(routes)
    corners = [seen.getpixel((x, y)) for y in (0, -1 + seen.height) for x in (0, -1 + seen.width)]
    assert corners == [ImageColor.getrgb(color) for color in pictures.COLORS[:4]]
