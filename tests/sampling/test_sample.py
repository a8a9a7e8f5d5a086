"""Sampling as people use it, and the mistakes they make."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor

import sample
from clip import MODELS
from sampling import latent, pictures, views
from tests import figures
from weights.generator_file import load_generator

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def run(run_main):
    """sample.py with arguments → exit status, stdout, stderr."""
    return functools.partial(run_main, sample.main, "--checkpoint", figures.generator_file())


@pytest.fixture(scope="module")
def demo():
    return load_generator(figures.generator_file())


def test_the_first_picture(tmp_path):
    """The README's command, on the demo model, in a fresh process whose console and locale know ASCII alone."""
    ascii_only = {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "sample.py", "red heart", "--out", tmp_path / "a.png"]
    environment = os.environ | ascii_only
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "256?256" in done.stdout and str(tmp_path / "a.png") in done.stdout
    picture = Image.open(tmp_path / "a.png")
    assert picture.width > 4 * 128 and picture.height > 128


def test_the_same_seed_is_the_same_picture(run, tmp_path):
    for name, seed in (("a.png", 7), ("b.png", 7), ("c.png", 8)):
        assert run("a small yellow star", "--seed", seed, "--out", tmp_path / name)[0] == 0
    a, b, c = (Image.open(tmp_path / name).tobytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b != c


@torch.no_grad()
def test_truncation_goes_toward_the_prompts_own_mean(demo):
    generator, clip, _ = demo
    text, z = latent.read(generator, clip, ["a red square", "a blue cross"]).global_text, latent.noise(generator, 2, 1)
    w, mean = generator.mapping(z, text), latent.mean_code(generator, text)
    for psi in (0.0, 0.5, 1.0):
        torch.testing.assert_close(latent.codes(generator, z, text, psi), mean + psi * (w - mean))
    assert not torch.allclose(*mean)


def test_prompts_of_a_file_and_unusual_ones_are_drawn_and_explained(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue\u2028 star 🐉\n", encoding="utf-8")
    out = tmp_path / "new folder" / "a.png"
    status, stdout, stderr = run("word " * 10_000, "--prompts", tmp_path / "prompts.txt", "--num", 2, "--out", out)
    assert status == 0 and "6 pictures" in stdout and out.is_file(), stderr
    assert "too long" in stdout and "does not know 🐉" in stdout and "captions show boxes in place of 🐉" in stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "nothing to draw"),
        (("x", "--checkpoint", "/missing.safetensors"), "no generator at"),
        (("--latent-walk", "x", "y"), "needs one prompt"),
        (("--interpolate", "x", "y", "--steps", "1"), "interpolation needs both ends"),
        (("z", "--mix", "x", "y"), "their own two prompts"),
        (("x", "--latent-walk", "--truncation-sweep"), "not allowed with"),
        (("x", "--prompts", "/missing.txt"), "error: /missing.txt: No such"),
        (("x", "--prompts", "latin1.txt"), "latin1.txt is not UTF-8"),
        (("x", "--prompts", "jis.txt"), "or contains a NUL or escape character"),
        (("x", "--out", "/proc/a.png"), "error: /proc/a.png: No such"),
        (("x", "--out", "picture.xyz"), "unknown picture format"),
        (("x", "--out", "folder.png"), "error: folder.png: a folder is where a file is needed"),
        (("x", "--out", "circle.png"), "error: circle.png: Too many levels of symbolic links"),
        (("x", "--out", "latin1.txt/a.png"), "a file or a broken link is where a folder is needed"),
        (("x", "--checkpoint", MODELS / "judge_clip.safetensors"), "of Aurora; give the generator_ema.safetensors"),
        (("x", "y", "--num", "501"), "1002 pictures are too many for one file"),
        (("x", "--truncation", "1e30"), "1e30: give a number from -10 to 10"),
        (("x", "--device", "abacus"), "use auto, cpu, cuda"),
        (("x", "--steps", "9"), "without a view --steps is not used; leave it out"),
        (("x", "--seeds", "1", "2", "--num", "4"), "with --seeds --num is not used"),  # 4 is the default
        (("--show", "a.png", "--num", "4"), "with --show --num is not used"),
        (("x", "--truncation-sweep", "--truncation", "0"), "with --truncation-sweep --truncation is not used"),
        (("x", "--enlarge", "a.png", "--experts"), "with --enlarge --experts is not used"),
        (("x", "--each", "all", "--out", "a.png"), "with --each --out is not used"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    Path("jis.txt").write_bytes("赤い心".encode("iso2022_jp"))
    Path("circle.png").symlink_to("circle.png")
    Path("latin1.txt").write_bytes("ein grüner Kreis".encode("latin-1"))
    status, _, stderr = run(*arguments)
    assert status == 2 and says in stderr.splitlines()[-1] and "Traceback" not in stderr


@pytest.mark.parametrize(
    ("arguments", "columns", "rows"),
    [
        (("a red circle", "a blue star", "--seeds", 1, 7, 1), 3, 2),
        (("a red circle", "--truncation-sweep"), 6, 1),
        (("--interpolate", "a red circle", "a large blue star", "--steps", 5), 5, 1),
        (("--interpolate", "a red circle", "a star", "--part", "local"), 8, 1),
        (("--mix", "red circle", "blue star"), 6, 1),
        (("a red circle", "--latent-walk", "--steps", 10, "--out", "walk.png"), 8, 2),
    ],
)
def test_every_view_is_a_grid_of_the_frames_it_says(run, tmp_path, arguments, columns, rows):
    out = tmp_path / "a.png"
    arguments = [out if a == "walk.png" else a for a in arguments]
    status, _, stderr = run(*arguments, *(() if out in arguments else ("--out", out)))
    assert status == 0, stderr
    picture = Image.open(out)
    assert picture.width == columns * (pictures.CELL + pictures.MARGIN) + pictures.MARGIN
    assert picture.height // pictures.CELL == rows


def test_a_gif_has_a_frame_for_each_step_and_maps_beside_the_picture(run, tmp_path):
    out = tmp_path / "walk.gif"
    assert run("a red circle", "--latent-walk", "--steps", 6, "--experts", "--out", out)[0] == 0
    picture = Image.open(out)
    assert picture.n_frames == 6 and picture.width > 2 * pictures.CELL


def test_the_ends_of_an_interpolation_are_its_prompts_and_half_of_it_moves_half(demo):
    """At 0 and 1 it gives the prompts' own pictures; with one part alone the other stays the first prompt's."""
    generator, clip, _ = demo
    prompts = ["a large red circle on a white background", "a small blue star on a black background"]
    with torch.no_grad():
        a, b = (views.samples(generator, clip, [p], 1, 3, psi=0.7)[0] for p in prompts)
        both = views.interpolation(generator, clip, prompts, 3, 0.7, 3, "both")
        for end, own in ((both[0], a), (both[2], b)):
            torch.testing.assert_close(end.w, own.w, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(end.local_text, own.local_text, rtol=1e-3, atol=1e-4)
        moved = views.interpolation(generator, clip, prompts, 3, 0.7, 3, "global")[2]
        torch.testing.assert_close(moved.w, b.w, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(moved.local_text, a.local_text)


def test_the_arc_between_two_directions():
    """Halfway between (2, 0) and (0, 4) lies 45°, at the mean length 3."""
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    torch.testing.assert_close(views.between(a, b, 0.5), torch.tensor([[3.0, 3.0]]) / 2**0.5)


def test_an_expert_map_has_the_routes_colors_in_place():
    routes = torch.tensor([0, 1, 2, 3])
    seen = pictures.expert_map(routes)
    corners = [seen.getpixel((x, y)) for y in (0, -1 + seen.height) for x in (0, -1 + seen.width)]
    assert corners == [ImageColor.getrgb(color) for color in pictures.COLORS[:4]]
