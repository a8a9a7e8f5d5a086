"""Sampling as people use it, and the mistakes they make."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sample
from checkpoint import load_generator

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(monkeypatch, capsys):
    """sample.py with arguments → exit status, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        status = 0
        try:
            sample.main()
        except SystemExit as exit:
            status = exit.code
        said = capsys.readouterr()
        return status, said.out, said.err.strip()

    return run


@pytest.fixture(scope="module")
def demo():
    return load_generator(sample.DEMO)


def test_the_first_picture(tmp_path):
    """The README's command, on the demo model, in a fresh process."""
    command = [sys.executable, "sample.py", "a small red circle on a gray background", "--out", tmp_path / "a.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "a.png") in done.stdout
    picture = Image.open(tmp_path / "a.png")
    assert picture.width > 4 * 128 and picture.height > 128


def test_the_demo_model_is_small_enough_and_says_where_it_comes_from(demo):
    assert sample.DEMO.stat().st_size <= 24 * 2**20
    generator, _, notes = demo
    assert notes["preset"] == "shapes" and notes["images"] > 0
    assert generator.config.levels[-1].resolution == notes["resolution"]


def test_the_same_seed_is_the_same_picture(run, demo, tmp_path):
    generator, clip, _ = demo
    prompt = "a large blue ring left of a small yellow star"
    first = sample.draw(generator, clip, prompt, 3, seed=5)
    assert torch.equal(first, sample.draw(generator, clip, prompt, 3, seed=5))
    assert not torch.equal(first, sample.draw(generator, clip, prompt, 3, seed=6))
    torch.testing.assert_close(first[:2], sample.draw(generator, clip, prompt, 2, seed=5), rtol=1e-3, atol=1e-3)
    for name in ("a.png", "b.png"):
        assert run(prompt, "--seed", 7, "--out", tmp_path / name)[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_truncation_goes_toward_the_prompts_own_mean(demo):
    """ψ = 0 leaves no variety, and another prompt has another mean; ψ = 1 is the code itself."""
    generator, clip, _ = demo
    prompt = "a large red square on a white background"
    means = sample.draw(generator, clip, prompt, 3, seed=1, truncation=0.0)
    torch.testing.assert_close(means[0], means[1])
    other = sample.draw(generator, clip, "a large blue cross on a black background", 1, seed=1, truncation=0.0)
    assert not torch.allclose(means[:1], other, atol=0.1)
    spread = [sample.draw(generator, clip, prompt, 8, 1, psi).std(0).mean() for psi in (0.0, 0.5, 1.0)]
    assert spread[0] < spread[1] < spread[2]
    text = clip.encode_text(clip.tokenize([prompt]))
    z = torch.randn(1, generator.config.z_dim, generator=torch.Generator().manual_seed(1))
    image = generator(z, text.tokens, text.eot).image.clamp(-1, 1)
    torch.testing.assert_close(sample.draw(generator, clip, prompt, 1, seed=1), image, rtol=1e-3, atol=1e-3)


def test_prompts_from_a_file_and_several_at_once(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue star 🐉\n", encoding="utf-8")
    out = tmp_path / "new folder" / "a.png"
    status, stdout, _ = run("a cyan ring", "--prompts", tmp_path / "prompts.txt", "--num", 2, "--out", out)
    assert status == 0 and "6 pictures" in stdout and "🐉" in stdout  # said to be unknown
    assert out.is_file()


def test_unusual_prompts_are_answered_and_explained(run, tmp_path):
    status, stdout, stderr = run("word " * 10_000, "a mauve 🐉", "--num", 1, "--out", tmp_path / "a.png")
    assert status == 0, stderr
    assert "too long" in stdout and "mauve" in stdout


def write_checkpoint(path, kind):
    if kind == "truncated":
        path.write_bytes(sample.DEMO.read_bytes()[:50_000])
    elif kind == "foreign":
        save_file({"x": torch.ones(2)}, path)
    elif kind == "hostile":

        class Hostile:
            def __reduce__(self):
                return (os.mkdir, (str(path.parent / "executed"),))

        torch.save({"generator": Hostile()}, path)
    elif kind == "foreign pickle":
        torch.save({"x": torch.ones(2)}, path)
    else:
        path.write_bytes(b"text")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.safetensors", "truncated"), ("a.safetensors", "foreign"), ("a.safetensors", "text"), ("a.pth", "text"),
     ("a.pth", "truncated"), ("a.pth", "hostile"), ("a.pth", "foreign pickle")],
)  # fmt: skip
def test_a_bad_checkpoint_is_told_in_one_line(run, tmp_path, name, kind):
    write_checkpoint(tmp_path / name, kind)
    status, _, stderr = run("a red circle", "--checkpoint", tmp_path / name, "--out", tmp_path / "a.png")
    assert status == 2 and stderr.startswith("error: ") and len(stderr.splitlines()) == 1
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "nothing to draw"),
        (("",), "a prompt is empty"),
        (("a circle", "  "), "a prompt is empty"),
        (("x", "--checkpoint", "/missing.safetensors"), "no checkpoint at"),
        (("x", "--prompts", "/missing.txt"), "cannot be read"),
        (("x", "--prompts", "LATIN1"), "not UTF-8"),
        (("x", "--out", "/proc/a.png"), "cannot be written"),
        (("x", "--out", "picture.xyz"), "no picture format"),
        (("x", "--num", "0"), "not a positive number"),
        (("x", "--device", "abacus"), "use auto, cpu, cuda"),
    ],
)
def test_mistakes_are_told_in_one_line(run, tmp_path, arguments, says):
    (tmp_path / "latin1.txt").write_bytes("ein grüner Kreis".encode("latin-1"))
    status, _, stderr = run(*(tmp_path / "latin1.txt" if a == "LATIN1" else a for a in arguments))
    assert status == 2 and says in stderr.splitlines()[-1] and "Traceback" not in stderr
