"""The questions about the emoji's words, and the variety."""

import collections
import io

import pytest
import torch

from data.emoji import read_emoji
from data.pairs import read_image
from evaluation import emoji
from evaluation.extractors import Extractor


@pytest.fixture(scope="module")
def pictures():
    return read_emoji()


def test_every_question_has_one_answer_and_held_out_names_are_never_seen(pictures):
    facts = [sample.facts for sample in pictures]
    asked = emoji.questions(facts, seed=0)
    assert asked == emoji.questions(facts, seed=0)
    kinds = collections.Counter(kind for kind, _, _ in asked)
    assert kinds == {"names": 400, "tags": 400, "held-out names": 60, "held-out styles": 40, "held-out tones": 60}
    seen = {f["name"] for f in facts if not f["aurora_held_out"]}
    held_out = {answer for kind, _, answer in asked if kind == "held-out names"}
    assert not seen & held_out
    names_of = collections.defaultdict(set)
    for f in facts:
        for tag in f["tags"]:
            names_of[tag] |= {f["name"]} & seen
    assert all(names_of[prompt] == {answer} for kind, prompt, answer in asked if kind == "tags")


def test_r_precision_of_each_kind():
    """A reader that sees colors only, a generator that draws three of four prompts in the color of their answer."""
    colors = {"red": [1.0, 0, 0], "green": [0, 1.0, 0], "blue": [0, 0, 1.0]}
    asked = [("names", "red", "red"), ("names", "green", "green"), ("tags", "sky", "blue"), ("tags", "grass", "green")]
    drawn = {"red": "red", "green": "green", "sky": "blue", "grass": "red"}

    def draw(prompts, seed):
        yield torch.tensor([colors[drawn[prompt]] for prompt in prompts])[:, :, None, None].expand(-1, -1, 4, 4)

    texts = lambda captions: torch.tensor([colors[caption] for caption in captions])  # noqa: E731
    reader = Extractor("colors", lambda pixels: pixels.float().mean((2, 3)) / 127.5 - 1, texts)
    assert emoji.r_precision(draw, asked, 0, 64, reader) == {"names": (1.0, 2), "tags": (0.5, 2)}


def test_variety_is_a_share_of_that_of_real_pictures(pictures):
    """Equal pictures have none. Half of them black and half white: 16 of 28 pairs are at distance 2. The names
    have held-out pictures, and some have skin tones.
    """
    asked, names = [], {s.facts["name"] for s in pictures if s.facts["aurora_held_out"] in ("style", "tone")}
    pictures = [s for s in pictures if s.facts["name"] in names]

    def grey(captions, seed):
        yield torch.zeros(len(captions), 3, 64, 64)

    def black_and_white(captions, seed):
        asked.extend(captions)
        yield torch.tensor([-1.0, 1.0]).repeat(len(captions) // 2)[:, None, None, None].expand(-1, 3, 64, 64)

    assert emoji.variety(grey, pictures, 0, names=3) == (0.0, 3)
    share, _ = emoji.variety(black_and_white, pictures, 0, names=3)
    real = 0.0
    for name in asked[:: emoji.SEEDS]:
        same = [s for s in pictures if s.facts["name"] == name]
        svgs = [s.image for s in same if not s.facts["tone"] and not s.facts["aurora_held_out"]]
        images = torch.stack([read_image(io.BytesIO(svg), 64) for svg in svgs])
        real += emoji.spread(emoji.resize(images, 8).flatten(1))
    assert share == pytest.approx(3 * 2 * 16 / 28 / real, rel=1e-2)  # pictures are rounded to 8 bits
