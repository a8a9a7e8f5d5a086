"""What an edit leaves alone, and that the command draws all of them."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from clip import load_clip
from experiments import edit
from neighbours.command import Trained
from neighbours.muse import Muse


@pytest.fixture(scope="module")
def system():
    torch.manual_seed(0)
    return Muse(load_clip("emoji"), 32, torch.device("cpu"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A hundred steps are for others to test."""
    monkeypatch.setattr(Muse, "edit", lambda self, seed, images, text: images)


def test_the_middle_is_a_quarter_of_the_picture():
    assert edit.middle(32).sum() == 16**2 and edit.middle(32)[0, 8, 23] and not edit.middle(32)[0, 7, 16]


def test_a_hole_and_a_border_are_drawn_anew_and_the_rest_stays(system, monkeypatch):
    """By the tokens: the decoder, which sees their neighbours, is taken out of the way."""
    text = system.clip.read(["red heart"])
    image = torch.rand(3, 32, 32) * 2 - 1
    decoded = []
    monkeypatch.setattr(system.vqgan, "decode", lambda tokens: decoded.append(tokens) or torch.zeros(1, 3, 32, 32))
    images = edit.edits(system, image, text, seed=0)
    inner, outer, whole = decoded
    assert torch.equal(images[0], image) and len(images) == len(edit.COLUMNS)
    hole = edit.middle(8)
    assert torch.equal(inner[~hole], whole[~hole]) and (inner[hole] != whole[hole]).any()
    assert torch.equal(outer[hole], whole[hole]) and (outer[~hole] != whole[~hole]).any()


def test_the_command(system, tmp_path, run_main):
    checkpoint, picture = tmp_path / "generator_ema.safetensors", tmp_path / "in.png"
    trained = Trained(system, SimpleNamespace(batch=4, unconditional=False), [])
    trained.save_generator(checkpoint, {"clip": "emoji"})
    Image.new("RGB", (40, 50), "red").save(picture)
    options = ["--checkpoint", checkpoint, "--num", 1, "--out", tmp_path / "out.png"]
    status, _, error = run_main(edit.main, picture, "red heart", *options)
    assert status == 0 and Image.open(tmp_path / "out.png").width == 5 * 134 + 6, error
    for damage, says in ((lambda: picture.write_bytes(b"no picture"), "cannot be used"), (picture.unlink, "be read")):
        damage()
        status, _, error = run_main(edit.main, picture, "red heart", *options)
        assert status == 2 and says in error and "\n" not in error
