"""The curriculum that made models/clip.safetensors, and what the small CLIP of the scenes can tell apart."""

from dataclasses import replace

import torch

from clip import load_clip
from experiments.scenes_clip import COURSES, train_small, twin_accuracy

# Of both courses a few steps, of each kind.
BRIEF = [replace(COURSES[0], steps=6, order=(2, 4)), replace(COURSES[1], steps=4, order=(0, 2))]


def test_training_is_reproducible():
    first, second = (train_small(courses=BRIEF, batch=16, seed=1) for _ in range(2))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_training_learns_colors_in_seconds():
    clip = train_small(courses=[replace(COURSES[0], steps=60)], batch=64)
    assert twin_accuracy(clip, "color", 32, count=200) > 0.75  # chance: 0.5


def test_the_small_clip_tells_apart_what_the_networks_are_to_draw():
    clip = load_clip("small")
    least = {"background": 0.99, "color": 0.98, "size": 0.97, "number": 0.98, "shape": 0.85}
    least |= {"relation": 0.96, "axis": 0.98}
    for difference, share in least.items():
        assert twin_accuracy(clip, difference, 32) >= share, difference
