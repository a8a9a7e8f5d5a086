"""The small CLIP for any captioned pictures."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from clip import load_clip
from common.cli import UserError
from data import sources
from tests import figures
from tests.data.files import jpeg
from training.small_clip import clip_of_new_run, contrast, draw_batches, mislead, train_small_clip

COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}


def test_it_learns_captions_and_understands_words_that_no_caption_contains(tmp_path):
    for place, color in itertools.product(("sky", "wall"), COLORS):
        (tmp_path / f"{color} {place}.jpg").write_bytes(jpeg(COLORS[color]))
        (tmp_path / f"{color} {place}.txt").write_text(f"{color} {place}\na {place} that is {color}\n")
    source = sources.open_data(str(tmp_path), 32, seed=0)
    clip = train_small_clip(source, steps=60, batch=16)
    images = [torch.tensor(COLORS[name]).view(1, 3, 1, 1).expand(1, 3, 32, 32) / 127.5 - 1 for name in ("red", "blue")]

    def rather(warm, cold):
        """By how much the first text fits better than the second: a red picture, and a blue one."""
        difference = clip.read([warm]).embedding - clip.read([cold]).embedding
        return [(F.normalize(clip.encode_image(image)) @ difference.T).item() for image in images]

    red, blue = rather("red sky", "blue sky")
    assert red > 0.1 and blue < -0.1
    red, blue = rather("a scarlet thing", "an azure thing")
    assert red > blue + 0.02


def test_contrast_is_clips_loss_and_equal_captions_share_their_targets():
    clip, images = load_clip("emoji"), torch.rand(4, 3, 32, 32) * 2 - 1
    text = clip.read(["cat", "cat", "sun", "tree"]).embedding
    logits = clip.logit_scale * F.normalize(clip.encode_image(images), dim=-1) @ text.T
    targets = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    torch.testing.assert_close(contrast(clip, [images], text), expected)


def test_misled_pictures_fit_their_captions_less_and_stay_near():
    clip, images = load_clip("emoji"), figures.images(range(16), 32)
    text = clip.read([figures.caption(i) for i in range(16)]).embedding
    images = [images[:8], images[8:]]
    misled = mislead(clip, images, text, 0.3)
    assert all((a - b).abs().max() <= 0.3 for a, b in zip(images, misled, strict=True))
    noise = [x + 0.3 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x).sign() for x in images]
    assert contrast(clip, misled, text) > contrast(clip, noise, text) > 0


def test_half_of_the_batches_are_neighbours_in_the_alphabet():
    captions = [[f"{letter}{i:03d}"] for letter in "abcdefgh" for i in range(100)]
    torch.manual_seed(0)
    batches = [texts for _, texts in itertools.islice(draw_batches(captions, 16), 64)]
    letters = [len({text[0] for text in texts}) for texts in batches]
    assert sum(count <= 3 for count in letters) == 32  # of eight letters, drawn equally often


def test_a_file_of_the_user_is_left_alone(tmp_path):
    path = tmp_path / "clip.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"no \.safetensors"):
        clip_of_new_run(path, "emoji", None, 1, "cpu")
    assert path.read_bytes() == b"mine"
