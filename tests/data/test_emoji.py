"""The emoji that ship with the repository: what is drawn in training, and what is held out."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from data import sources

STYLES = {"noto", "twemoji", "fluent"}


@pytest.fixture(scope="module")
def samples():
    """[(facts, captions)] of every picture, none decoded."""
    source = sources.open_data("emoji", 32, 0)
    return [
        (json.loads(parts[".json"]), parts[".txt"].decode().splitlines())
        for _, parts in itertools.chain.from_iterable(map(source.raw, source.urls))
    ]


def test_captions_leave_the_style_open_half_of_the_time(samples):
    for facts, captions in samples:
        styled = [caption for caption in captions if caption.endswith(f", {facts['style']} style")]
        assert 2 * len(styled) == len(captions) and captions[0].startswith(facts["name"])
        assert facts["tone"] in captions[0]


def test_every_name_is_drawn_as_often_as_it_has_styles(samples):
    drawn, styles = Counter(), {}
    for facts, _ in samples:
        drawn[facts["name"]] += facts["weight"]
        styles.setdefault(facts["name"], set()).add(facts["style"])
    assert all(drawn[name] == pytest.approx(len(styles[name]), abs=0.01) for name in styles)
    assert set.union(*styles.values()) == STYLES


def test_each_part_of_a_held_out_pair_is_seen_elsewhere(samples):
    seen = [facts for facts, _ in samples if not facts["held_out"]]
    names = {(facts["name"], facts["style"]) for facts in seen}
    tones, codes = {facts["tone"] for facts in seen}, {facts["code"] for facts in seen}
    held_out = [facts for facts, _ in samples if facts["held_out"]]
    assert Counter(facts["held_out"] for facts in held_out) == {"tone": 174, "style": 40}
    assert len({facts["code"] for facts in held_out if facts["held_out"] == "tone"}) == 60
    for facts in held_out:
        if facts["held_out"] == "tone":  # the person in other tones, the tone of other people
            assert facts["code"] not in codes and (facts["name"], facts["style"]) in names and facts["tone"] in tones
        else:  # the name in other styles
            assert (facts["name"], facts["style"]) not in names and any(n == facts["name"] for n, _ in names)


def test_training_never_draws_a_held_out_picture(samples):
    source = sources.open_data("emoji", 32, 0)
    held_out = {caption for facts, captions in samples if facts["held_out"] == "tone" for caption in captions}
    drawn = itertools.islice(source.drawn(np.random.default_rng(0)), 12_000)
    used = (parts[".txt"].decode() for _, parts in drawn if source.is_for((_, parts), held_out=False))
    captions = {caption for text in used for caption in text.splitlines()}
    assert len(captions) > 5000 and not captions & held_out
