"""The Python interface: what the README shows, and that the commands draw the same."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from common.cli import UserError
from sampling import latent, pictures
from sampling.pipeline import Pipeline, forced, routers
from tests import ROOT


def test_the_readme_runs(monkeypatch, tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "Pipeline" in block]
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert len(names["images"]) == 4 and names["images"][0].size == (256, 256)


def test_the_command_draws_what_the_interface_draws(pipe, run_main, tmp_path):
    arguments = ("red heart", "whale", "--num", 2, "--seed", 3, "--device", "cpu", "--out", tmp_path / "a.png")
    assert run_main(sample.main, *arguments)[0] == 0
    drawn = pipe.draw(pipe.frames(["red heart", "whale"], num=2, seed=np.int64(3)))
    ours = pictures.grid([pictures.to_pil(image) for image in drawn.images], drawn.captions, 2)
    assert Image.open(tmp_path / "a.png").tobytes() == ours.tobytes()
    native = pipe.sample(["red heart", "whale"], num=2, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(native, drawn.pictures, strict=True))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda pipe: pipe.sample(" "), "a prompt is empty"),
        (lambda pipe: pipe.sample("caf\udce9"), "not UTF-8"),
        (lambda pipe: pipe.sample("red heart", psi=1e39), "not finite numbers"),
        (lambda _: Pipeline.load(resolution=0), "--resolution 0: choose one of"),
    ],
)
def test_mistakes_are_one_line(pipe, call, says):
    with pytest.raises(UserError, match=re.escape(says)):
        call(pipe)


def test_experts_say_who_took_each_point_and_how_surely(pipe):
    drawn = pipe.experts("red heart", num=2)
    assert list(routers(pipe.generator)) == ["8.0.0", "16.0.0"]
    assert list(drawn.routings) == ["8.0.0", "16.0.0", "16.0.0, large"]
    for name, router in routers(pipe.generator).items():
        routing, points, experts = drawn.routings[name], int(name.split(".")[0]) ** 2, len(router.to_logits.weight)
        assert routing.logits.shape == (2, points, experts) and routing.expert_index.shape == (2, points)
        torch.testing.assert_close(routing.gate, routing.logits.softmax(-1).max(-1).values)


def test_a_forced_expert_takes_the_marked_points_and_no_others(pipe):
    frames = pipe.frames("red heart", num=1, seed=0)
    free = pipe.draw(frames)
    points = [(0, index) for index in range(20)]
    with forced(pipe.generator, "8.0.0", points, 2):
        drawn = pipe.draw(frames)
    routing, before = drawn.routings["8.0.0"], free.routings["8.0.0"]
    assert (routing.expert_index[0, :20] == 2).all()
    assert torch.equal(routing.expert_index[0, 20:], before.expert_index[0, 20:])
    torch.testing.assert_close(routing.gate[0, :20], before.logits.softmax(-1)[0, :20, 2])
    assert not torch.equal(drawn.images, free.images)
    assert torch.equal(pipe.draw(frames).images, free.images)  # and after it all is as before
    for name, expert, says in (("4.0.0", 0, "no router 4.0.0"), ("8.0.0", 9, "no expert 9")):
        with pytest.raises(UserError, match=says), forced(pipe.generator, name, points, expert):
            pass


@torch.no_grad()
def test_the_mean_code_of_a_prompt_is_that_of_256_latents(pipe):
    """StyleGAN-XL's truncation to the mean of a class, estimated; two prompts have one each."""
    text = torch.randn(2, pipe.generator.config.text_dim, generator=torch.Generator().manual_seed(1))
    z = torch.randn(256, pipe.generator.config.z_dim, generator=torch.Generator().manual_seed(0))
    expected = [torch.stack([pipe.generator.mapping(one[None], t[None])[0] for one in z]).mean(0) for t in text]
    torch.testing.assert_close(latent.mean_code(pipe.generator, text), torch.stack(expected))
