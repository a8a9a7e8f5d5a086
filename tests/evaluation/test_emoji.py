"""Held-out pairs ask for what is held out, and styles are counted by a classifier that saw other names."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data import sources
from evaluation import emoji
from evaluation.extractors import Extractor
from weights.checkpoint import SHAPES, load_generator

SHADES = {"noto": 60, "twemoji": 130, "fluent": 200}  # stand for the styles


def write_emoji(path, names=20):
    """A small shard as data/make_emoji.py writes it; each style is a shade of grey. Two pairs are held out."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(names):
            for style, shade in SHADES.items():
                tone = ", dark skin tone" if i % 5 == 4 else ""
                facts = {"held_out": {(0, "noto"): "style", (4, "fluent"): "tone"}.get((i, style))}
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(shade - 20, shade + 20, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
                text = f"name {i}{tone}\nname {i}{tone}, {style} style\n"
                parts = {"png": buffer.getvalue(), "txt": text.encode(), "json": json.dumps(facts).encode()}
                for suffix, data in parts.items():
                    info = tarfile.TarInfo(f"{i:04d}{style}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def source(tmp_path):
    return sources.open_data(str(write_emoji(tmp_path / "emoji.tar")), 32, seed=0)


MEANS = Extractor("mean colors", lambda pixels: pixels.float().mean((2, 3)), None)


def test_the_classifier_of_style_is_tested_on_other_names(source, monkeypatch):
    fitted = []
    fit = emoji.logistic_regression
    monkeypatch.setattr(emoji, "logistic_regression", lambda x, y: fitted.append((x, y)) or fit(x, y))
    accuracy, classify, names = emoji.train_classifier(source, 32, MEANS)
    assert accuracy == 1
    order = sorted(SHADES)  # integers stand for the styles in alphabetical order
    pixels = torch.tensor([SHADES[style] for style in order])[:, None].expand(-1, 3).float()
    assert classify(pixels).tolist() == [0, 1, 2]
    labels, features = emoji.extract_examples(source, False, emoji.name_and_style, 32, {"x": MEANS})
    seen = {tuple(row) for row in fitted[0][0].tolist()}
    trained_on = {name for (name, _), row in zip(labels, features["x"].tolist(), strict=True) if tuple(row) in seen}
    assert len(trained_on) == round(0.8 * 16) and not trained_on & set(names)  # 16 names have no skin tone
    assert "name 0" not in names  # not shown in all styles


def test_a_classifier_of_what_cannot_be_told_is_no_better_than_chance():
    torch.manual_seed(0)
    x, y = torch.randn(600, 2), torch.randint(3, (600,))
    classify = emoji.logistic_regression(x[:300], y[:300])
    assert (classify(x[300:]) == y[300:]).float().mean() < 0.5


def test_two_styles_or_more():
    styles = torch.tensor([[0, 0, 0], [0, 1, 0], [2, 1, 0], [2, 2, 2]])
    assert emoji.share_with_two(styles) == 0.5


def test_styles_over_seeds_of_a_generator_that_knows_one(source, monkeypatch):
    def one_style(_, __, captions, *___):
        return {"styles": torch.full((len(captions), 3), 130.0)}

    def by_seed(_, __, captions, *___):
        return {"styles": torch.tensor([60.0, 130.0]).repeat(len(captions) // 2)[:, None].expand(-1, 3)}

    for drawn, share in ((one_style, 0), (by_seed, 1)):
        monkeypatch.setattr(emoji, "extract_generated", drawn)
        found = emoji.styles_over_seeds(None, None, source, 1.0, 0, 32, 16, MEANS)
        assert found["two styles"] == share and found["names"] == 2 and found["by mistake"] == 0


def test_held_out_pairs_are_asked_for_by_their_style(source):
    generator, clip, _ = load_generator(SHAPES)
    asked = []

    def texts(captions):
        asked.extend(captions)
        shades = [SHADES[emoji.STYLE.search(caption)[1]] for caption in captions]
        return torch.stack([torch.tensor([1.0, shade]) for shade in shades])

    reader = Extractor("", lambda pixels: torch.stack([torch.ones(len(pixels)), MEANS.images(pixels)[:, 0]], 1), texts)
    found = emoji.held_out_r_precision(generator, clip, source, 1.0, 0, 32, reader)
    assert sorted(asked) == ["name 0, noto style", "name 4, dark skin tone, fluent style"]
    assert {kind: number for kind, (_, _, number) in found.items()} == {"tone": 1, "style": 1, "all": 2}
    assert all(0 <= share <= 1 for share, _, _ in found.values())
    assert found["all"][1] == pytest.approx((found["tone"][1] + found["style"][1]) / 2)
