"""What is asked of the emoji's words, and how variety is measured."""

import numpy as np
import pytest
import torch

from evaluation import emoji
from evaluation.extractors import Extractor


@pytest.fixture(scope="module")
def pictures():
    return list(emoji.read_emoji())


def test_every_question_has_one_answer_and_held_out_names_are_never_seen(pictures):
    facts = [facts for facts, _ in pictures]
    asked = emoji.questions(facts, seed=0)
    assert asked == emoji.questions(facts, seed=0)
    kinds = [kind for kind, _, _ in asked]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "names": 400,
        "tags": 400,
        "held-out names": 60,
        "held-out styles": 40,
        "held-out tones": 60,
    }
    seen = {f["name"] for f in facts if not f["aurora_held_out"]}
    held_out = {answer for kind, _, answer in asked if kind == "held-out names"}
    assert not seen & held_out
    for kind, prompt, answer in asked:
        if kind == "tags":
            assert {f["name"] for f in facts if prompt in f["tags"] and f["name"] in seen} == {answer}


def test_r_precision_is_told_by_kind(monkeypatch):
    """A reader that sees colors only, a generator that draws three of four prompts in the color of their answer."""
    colors = {"red": [1.0, 0, 0], "green": [0, 1.0, 0], "blue": [0, 0, 1.0]}
    asked = [("names", "red", "red"), ("names", "green", "green"), ("tags", "sky", "blue"), ("tags", "grass", "green")]
    drawn = {"red": "red", "green": "green", "sky": "blue", "grass": "red"}

    def extract(generator, text, prompts, *_):
        return {"reader": torch.tensor([colors[drawn[prompt]] for prompt in prompts])}

    monkeypatch.setattr(emoji, "extract_generated", extract)
    reader = Extractor("colors", None, lambda captions: torch.tensor([colors[caption] for caption in captions]))
    found = emoji.r_precision(None, None, asked, 1.0, 0, 64, reader)
    assert found == {"names": (1.0, 2), "tags": (0.5, 2)}


def test_spread_is_the_mean_distance_of_pairs():
    images = torch.rand(4, 3, 8, 8)
    pairs = [(a, b) for a in range(4) for b in range(a)]
    distances = [np.sqrt(np.mean((images[a].numpy() - images[b].numpy()) ** 2)) for a, b in pairs]
    assert emoji.spread(images) == pytest.approx(np.mean(distances), rel=1e-5)


def test_variety_is_none_of_equal_pictures_and_one_of_the_real_ones(pictures, monkeypatch):
    """Stand-ins for a generator: one draws the same picture always, one the pictures of the data themselves."""

    class Output:
        def __init__(self, image):
            self.image = image

    names = 5
    monkeypatch.setattr(emoji.latent, "noise", lambda generator, count, seed: torch.zeros(count, 1))
    monkeypatch.setattr(
        emoji.latent, "generate", lambda g, t, captions, *_: [Output(torch.zeros(len(captions), 3, 64, 64))]
    )
    assert emoji.variety(None, None, pictures, 1.0, 0, names) == (0.0, names)

    def real(generator, text, captions, *_):
        for name in dict.fromkeys(captions):
            svgs = [svg for f, svg in pictures if f["name"] == name and not f["tone"] and not f["aurora_held_out"]]
            images = torch.stack([emoji.read_image(emoji.io.BytesIO(svg), 64) for svg in svgs])
            own = emoji.spread(emoji.resize(images, 8))
            a, b = torch.full((3, 8, 8), -own / 2), torch.full((3, 8, 8), own / 2)
            share = emoji.SEEDS // 2  # of eight pictures in two kinds, 16 of 28 pairs differ
            kinds = torch.stack([a] * share + [b] * share) * 28 / 16
            yield Output(kinds.repeat_interleave(8, 2).repeat_interleave(8, 3))

    monkeypatch.setattr(emoji.latent, "generate", real)
    assert emoji.variety(None, None, pictures, 1.0, 0, names)[0] == pytest.approx(1.0, rel=1e-3)
