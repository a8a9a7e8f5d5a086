"""The judge reads rendered scenes, and counts as right what the caption says."""

import sys
from dataclasses import replace

import pytest
import torch

import judge as judging
import shapes
from aurora import Generator
from checkpoint import save_generator
from clip import load_clip
from judge import PAIRS, accuracies, scenes_with, truth


@pytest.fixture(scope="module")
def judge():
    return judging.load()


@pytest.mark.parametrize("resolution", judging.RESOLUTIONS)
def test_it_reads_unseen_scenes_nearly_always_right(judge, resolution):
    scenes = [shapes.scene(i, seed=123, pairs=PAIRS) for i in range(2000)]
    seen, centres = judge.read(shapes.draw(scenes, resolution))
    asked, places = truth(scenes)
    for name, value in asked.items():
        present = value >= 0
        assert (seen[name] == value)[present].float().mean() >= 0.99, name
    present = places.isfinite()
    assert (centres - places)[present].abs().mean() < 0.05  # of the picture's width


def test_the_truth_is_in_reading_order():
    scenes = [scene for scene in (shapes.scene(i) for i in range(200)) if scene.relation]
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


def test_its_verdict_on_a_generator_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["judge.py", "--num", "8", "--device", "cpu"])
    judging.main()
    said = capsys.readouterr().out
    for words in (
        "8 prompts with two objects",
        "shape and color",
        "relation",
        "Spread",
        "FID in",
        "Experts at",
    ):
        assert words in said


def test_a_generator_it_cannot_judge_is_refused_in_one_line(tmp_path, monkeypatch, capsys, generator_config):
    low = replace(generator_config, levels=generator_config.levels[:2], clip_width=128)
    save_generator(tmp_path / "low.safetensors", Generator(low), load_clip("small"), 8, {})
    for name, says in (("low.safetensors", "draws 8×8"), ("none.safetensors", "no checkpoint")):
        monkeypatch.setattr(sys, "argv", ["judge.py", "--checkpoint", str(tmp_path / name), "--device", "cpu"])
        with pytest.raises(SystemExit):
            judging.main()
        assert says in capsys.readouterr().err
