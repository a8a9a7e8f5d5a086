"""The small CLIP for any captioned pictures."""

import itertools

import pytest
import torch

from clip import load_clip
from common.cli import UserError
from data import sources
from data.scenes import COLORS, render, scene_or_twin
from tests.data.test_sources import jpeg
from training.small_clip import contrast, draw_batches, mislead, train_small_clip


def test_misled_pictures_fit_their_captions_less_and_stay_near():
    clip = load_clip("small")
    scenes = [scene_or_twin(i, 9) for i in range(32)]
    text = clip.read([scene.caption for scene in scenes]).embedding
    images = [render(scenes[:16], 16), render(scenes[16:], 32)]
    misled = mislead(clip, images, text, 0.3)
    assert all((a - b).abs().max() <= 0.3 for a, b in zip(images, misled, strict=True))
    noise = [x + 0.3 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x).sign() for x in images]
    assert contrast(clip, misled, text) > contrast(clip, noise, text) > 0


@pytest.fixture
def folder(tmp_path):
    """Sixteen pictures of one color each."""
    for i, (name, color) in enumerate(itertools.product(("sky", "wall"), COLORS.items())):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(tuple(int(255 * x) for x in color[1])))
        (tmp_path / f"{i}.txt").write_text(f"{color[0]} {name}\na {name} that is {color[0]}\n")
    return sources.open_data(str(tmp_path), 32, seed=0)


def test_it_learns_the_captions_of_a_folder(folder):
    clip = train_small_clip(folder, steps=60, batch=16)
    first, second = (clip.read([text]).embedding for text in ("red sky", "blue sky"))
    images = {
        name: torch.tensor(COLORS[name]).view(1, 3, 1, 1).expand(1, 3, 32, 32) * 2 - 1 for name in ("red", "blue")
    }
    red, blue = (clip.encode_image(images[name]) for name in ("red", "blue"))
    assert (red @ (first - second).T > 0).all() and (blue @ (second - first).T > 0).all()
    assert not clip.unknown_words("red wall") and clip.unknown_words("zebra") == ["zebra"]


def test_the_same_seed_gives_the_same_weights(folder):
    first, second, other = (train_small_clip(folder, steps=2, batch=8, seed=seed) for seed in (1, 1, 2))
    state = first.state_dict()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in state.items())
    assert not all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())


def test_no_text_stands_twice_in_a_batch_and_half_of_the_batches_are_neighbours_in_the_alphabet():
    captions = [[f"{letter}{i:03d}"] for letter in "abcdefgh" for i in range(100)]
    torch.manual_seed(0)
    batches = [texts for _, texts in itertools.islice(draw_batches(captions, 16), 64)]
    assert all(len(set(texts)) == len(texts) > 4 for texts in batches)
    letters = [len({text[0] for text in texts}) for texts in batches]
    assert sum(count <= 3 for count in letters) == 32  # of the eight letters, all drawn as often


def test_captions_that_are_all_the_same_teach_nothing(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg((i, 0, 0)))
        (tmp_path / f"{i}.txt").write_text("a picture")
    with pytest.raises(UserError, match="all captions are the same"):
        train_small_clip(sources.open_data(str(tmp_path), 32, seed=0), steps=2)
