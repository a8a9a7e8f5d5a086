"""The emoji that ship with the repository: what is drawn in training, and what is held out."""

import copy
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from data import sources
from data.emoji import captions_of


@pytest.fixture(scope="module")
def emoji():
    return sources.open_data("emoji", 8, seed=0, group=4)


def test_one_caption_in_five_names_the_style(emoji):
    for sample in emoji.samples:
        styled, others = captions_of(sample, [True]), captions_of(sample, [False])
        assert len(styled) == 2 and len(others) == 8 and others[0].startswith(sample.facts["name"])
        assert all(sample.facts["tone"] in caption for caption in styled + others)


def test_every_name_is_drawn_as_often_as_it_has_styles(emoji):
    drawn, styles = Counter(), defaultdict(set)
    for each in (sample.facts for sample in emoji.samples):
        drawn[each["name"]] += each["aurora_weight"]
        styles[each["name"]].add(each["style"])
    assert all(drawn[name] == pytest.approx(len(styles[name]), abs=0.01) for name in styles)
    assert len(set.union(*styles.values())) == 7


def test_pictures_and_groups_are_drawn_by_their_weights(emoji):
    weights, rng = defaultdict(float), np.random.default_rng(0)
    for sample in emoji.pictures:
        weights[bool(sample.facts["tone"])] += sample.facts["aurora_weight"]
    share = weights[True] / sum(weights.values())
    ungrouped = copy.copy(emoji)
    ungrouped.group = 1
    for source in (emoji, ungrouped):
        tones = [bool(sample.facts["tone"]) for sample, _ in source.draw(8000, rng)]
        assert np.mean(tones) == pytest.approx(share, abs=0.03)
        assert share < 0.75 * np.mean([bool(sample.facts["tone"]) for sample in source.pictures])


def test_a_group_is_one_emoji_by_different_artists_with_one_caption(emoji):
    drawn, whole = emoji.draw(320, np.random.default_rng(0)), 0
    for first in range(0, 240, 4):
        samples, captions = zip(*drawn[first : first + 4], strict=True)
        artists = Counter(sample.facts["style"] for sample in emoji.emoji[samples[0].facts["code"]])
        assert len({sample.facts["code"] for sample in samples}) == 1
        assert captions == captions[:1] * 4
        assert len({sample.place for sample in samples}) == min(4, artists.total())
        assert not any(f", {artist} style" in captions[0] for artist in artists)
        whole += artists.total() >= 4
    assert whole > 30
    assert all(caption in captions_of(sample, [True]) for sample, caption in drawn[240:])


def test_the_ranks_share_one_batch_which_the_step_determines(emoji):
    whole = next(emoji.batches(range(7, 9), 16, 0, 1))
    halves = [next(emoji.batches(range(7, 9), 8, rank, 2)) for rank in range(2)]
    assert whole.images.equal(torch.cat([half.images for half in halves]))
    assert whole.captions == halves[0].captions + halves[1].captions
    assert next(emoji.batches(range(8, 9), 16, 0, 1)).captions != whole.captions


def test_each_part_of_a_held_out_pair_is_seen_elsewhere_and_a_held_out_name_nowhere(emoji):
    parts = defaultdict(list)
    for each in (sample.facts for sample in emoji.samples):
        parts[each["aurora_held_out"]].append(each)
    assert [sample.facts for sample in emoji.pictures] == parts[None]
    seen = {(each["name"], each["style"]) for each in parts[None]}
    names, tones = {name for name, _ in seen}, {each["tone"] for each in parts[None]}
    codes = {each["code"] for each in parts[None]}
    assert set(parts) == {None, "tone", "style", "name"}
    assert all(f["code"] not in codes and f["name"] in names and f["tone"] in tones for f in parts["tone"])
    assert all((f["name"], f["style"]) not in seen and f["name"] in names for f in parts["style"])
    assert not names & {each["name"] for each in parts["name"]}
