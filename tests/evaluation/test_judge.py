"""The judge reads rendered scenes, and counts as right what the caption says."""

import pytest
import torch

from data.scenes import make_scene, render
from evaluation import judge as judging
from evaluation.judge import PAIRS, accuracies, scenes_with, truth


@pytest.fixture(scope="module")
def judge():
    return judging.load()


@pytest.mark.parametrize("resolution", judging.RESOLUTIONS)
def test_it_reads_unseen_scenes_nearly_always_right(judge, resolution):
    scenes = [make_scene(i, seed=123, pairs=PAIRS) for i in range(2000)]
    seen, centres = judge.read(render(scenes, resolution))
    asked, places = truth(scenes)
    for name, value in asked.items():
        present = value >= 0
        assert (seen[name] == value)[present].float().mean() >= 0.99, name
    present = places.isfinite()
    assert (centres - places)[present].abs().mean() < 0.05  # of the picture's width


def test_the_truth_is_in_reading_order():
    scenes = [scene for scene in (make_scene(i) for i in range(200)) if scene.relation]
    values, places = truth(scenes)
    for b, scene in enumerate(scenes):
        axis = values["arrangement"][b] - 1
        assert places[b, 0, axis] < places[b, 1, axis]
        first = scene.objects[0 if scene.relation in ("left of", "above") else 1]
        assert judging.OBJECT["color"][values["color 0"][b]] == first.color


def test_a_scene_is_right_for_its_own_caption_and_wrong_where_it_differs():
    for number in (1, 2):
        scenes = scenes_with(number, 50)
        seen, _ = truth(scenes)
        assert all(share == 1 for share in accuracies(seen, scenes).values())
    swapped = {**seen, "color 0": seen["color 1"], "color 1": seen["color 0"]}
    same = (seen["color 0"] == seen["color 1"]).float().mean().item()
    result = accuracies(swapped, scenes)
    assert result["both colors"] == 1 and result["relation"] == pytest.approx(same) and result["number"] == 1
    single = {**seen, "arrangement": torch.zeros_like(seen["arrangement"])}
    result = accuracies(single, scenes)
    assert result["number"] == result["both colors"] == result["relation"] == 0 and result["background"] == 1
