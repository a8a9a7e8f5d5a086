"""The emoji that ship with the repository: what is drawn in training, and what is held out."""

import json
from collections import Counter, defaultdict

import pytest

from data import sources, svg


@pytest.fixture(scope="module")
def samples():
    """[(facts, captions, picture)] of every picture, none decoded."""
    source = sources.open_data("emoji", 32, 0)
    parts = [sample.parts for sample in source.raw(source.urls[0])]
    return [(json.loads(p[".json"]), p[".txt"].decode().splitlines(), p[".svg"]) for p in parts]


def test_one_caption_in_five_names_the_style(samples):
    for facts, captions, _ in samples:
        styled = [caption for caption in captions if f", {facts['style']} style" in caption]
        assert 5 * len(styled) == len(captions) and captions[0].startswith(facts["name"])
        assert all(facts["tone"] in caption for caption in captions)


def test_every_name_is_drawn_as_often_as_it_has_styles(samples):
    drawn, styles = Counter(), defaultdict(set)
    for facts, *_ in samples:
        drawn[facts["name"]] += facts["aurora_weight"]
        styles[facts["name"]].add(facts["style"])
    assert all(drawn[name] == pytest.approx(len(styles[name]), abs=0.01) for name in styles)
    assert len(set.union(*styles.values())) == 7


def test_each_part_of_a_held_out_pair_is_seen_elsewhere_and_a_held_out_name_nowhere(samples):
    parts = defaultdict(list)
    for facts, *_ in samples:
        parts[facts["aurora_held_out"]].append(facts)
    seen = {(facts["name"], facts["style"]) for facts in parts[None]}
    names, tones = {name for name, _ in seen}, {facts["tone"] for facts in parts[None]}
    codes = {facts["code"] for facts in parts[None]}
    assert set(parts) == {None, "tone", "style", "name"}
    assert all(f["code"] not in codes and f["name"] in names and f["tone"] in tones for f in parts["tone"])
    assert all((f["name"], f["style"]) not in seen and f["name"] in names for f in parts["style"])
    assert not names & {facts["name"] for facts in parts["name"]}


def test_no_picture_is_refused(samples):
    for _, _, picture in samples[::5]:
        svg.check(picture)
