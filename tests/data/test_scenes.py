"""The built-in scenes say what they draw."""

import collections
import itertools

import numpy as np
import pytest
import torch

from data.scenes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    OF_ANY,
    RADII,
    RELATIONS,
    SEEN,
    SHAPES,
    SIZES,
    all_words,
    make_scene,
    make_twin,
    named_all_ways,
    render,
)

SCENES = [make_scene(i) for i in range(2000)]


def test_a_scene_is_a_function_of_its_index():
    assert make_scene(17, seed=3) == make_scene(17, seed=3)
    assert make_scene(17, seed=3) != make_scene(17, seed=4) != make_scene(18, seed=4)


def test_there_is_enough_to_learn():
    assert len(SHAPES) >= 4 and len(COLORS) >= 8 and len(SIZES) == 2 and len(BACKGROUNDS) >= 3
    assert {scene.relation for scene in SCENES} == {None, *RELATIONS}
    assert {len(scene.objects) for scene in SCENES} == {1, 2}


def test_held_out_pairs_are_never_drawn_nor_named():
    pairs = collections.Counter((o.shape, o.color) for scene in SCENES for o in scene.objects)
    assert not HELD_OUT & set(pairs) and set(pairs) == set(SEEN)
    for scene in SCENES:
        assert not any(f"{color} {shape}" in scene.caption for shape, color in HELD_OUT)
    unseen = [make_scene(i, pairs=sorted(HELD_OUT)) for i in range(50)]
    assert all((o.shape, o.color) in HELD_OUT for scene in unseen for o in scene.objects)


def test_captions_name_what_is_there():
    words = set(all_words())
    for scene in SCENES:
        for o in scene.objects:
            assert f"{o.size} {o.color} {o.shape}" in scene.caption
            least, most = RADII[len(scene.objects)][o.size]
            assert least <= o.radius <= most
        assert set(scene.caption.replace(",", " ,").split()) <= words | {","}
    assert np.mean([scene.background in scene.caption for scene in SCENES]) > 0.8


def test_relations_hold_and_objects_are_apart_and_inside():
    for scene in SCENES:
        for o in scene.objects:
            assert o.radius <= o.x <= 1 - o.radius and o.radius <= o.y <= 1 - o.radius
        if scene.relation:
            a, b = scene.objects
            along = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[
                scene.relation
            ]
            assert along >= a.radius + b.radius - 1e-9
            assert any(phrase in scene.caption for phrase in RELATIONS[scene.relation][0])


@pytest.mark.parametrize("difference", ["shape", "color", "size", "background", "relation", "axis", "number"])
def test_a_twin_differs_in_one_thing(difference):
    rng = np.random.default_rng(0)
    for scene in (scene for scene in SCENES[:200] if scene.relation or difference in OF_ANY):
        twin = make_twin(scene, difference, rng)
        if difference not in ("number", "axis"):
            assert (twin.wording, twin.relation) == (scene.wording, scene.relation)
        assert not any((o.shape, o.color) in HELD_OUT for o in twin.objects)
        assert all(o.radius <= o.x <= 1 - o.radius and o.radius <= o.y <= 1 - o.radius for o in twin.objects)
        if difference == "background":
            assert [*map(str, twin.objects)] == [*map(str, scene.objects)] and twin.background != scene.background
        elif difference == "relation":
            assert [str(o) for o in twin.objects] == [str(o) for o in scene.objects[::-1]]
        elif difference == "axis":
            assert [*map(str, twin.objects)] == [*map(str, scene.objects)] and twin.background == scene.background
            phrases, axis, sign = RELATIONS[twin.relation]
            a, b = (((o.x, o.y)[axis], (o.x, o.y)[1 - axis]) for o in twin.objects)
            assert axis != RELATIONS[scene.relation][1] and (b[0] - a[0]) * sign > abs(b[1] - a[1])
            assert any(f"{twin.objects[0]} {phrase} a {twin.objects[1]}" in twin.caption for phrase in phrases)
        elif difference == "number":
            (kept,) = map(str, twin.objects)
            assert kept in map(str, scene.objects) and twin.relation is None and twin.background == scene.background
            assert twin.caption.count("background") == scene.caption.count("background") and kept in twin.caption
            assert not any(phrase in twin.caption for phrases, *_ in RELATIONS.values() for phrase in phrases)
        else:
            pairs = zip(scene.objects, twin.objects, strict=True)
            changed = [
                name for a, b in pairs for name in ("shape", "color", "size") if getattr(a, name) != getattr(b, name)
            ]
            assert changed == [difference] and twin.background == scene.background


def test_scenes_named_all_ways_are_each_objects_named_first_on_each_axis():
    scenes = list(itertools.islice(named_all_ways(5), 40))
    for four in zip(*[iter(scenes)] * 4, strict=True):
        first, second = map(str, four[0].objects)
        assert [[*map(str, scene.objects)] for scene in four] == [[first, second], [second, first]] * 2
        axes = [RELATIONS[scene.relation][1] for scene in four]
        assert axes[0] == axes[1] != axes[2] == axes[3]
        assert all(scene.background == four[0].background for scene in four)


@pytest.mark.parametrize("resolution", [4, 8, 32, 96])
def test_pictures_show_the_colors_of_the_caption(resolution):
    scenes = [scene for scene in SCENES if len(scene.objects) == 1 and scene.objects[0].shape == "circle"][:40]
    images = (render(scenes, resolution) + 1) / 2
    assert images.shape == (len(scenes), 3, resolution, resolution) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    for scene, image in zip(scenes, images, strict=True):
        (o,) = scene.objects
        corner = image[:, -1 if o.y < 0.5 else 0, -1 if o.x < 0.5 else 0]
        np.testing.assert_allclose(corner, BACKGROUNDS[scene.background], atol=0.02)
        if resolution >= 32:
            centre = image[:, int(o.y * resolution), int(o.x * resolution)]
            np.testing.assert_allclose(centre, COLORS[o.color], atol=0.02)


def test_edges_are_antialiased_consistently_across_resolutions():
    """The average color of a picture does not depend on how finely it was drawn."""
    means = [render(SCENES[:60], resolution).mean((2, 3)) for resolution in (8, 64, 256)]
    assert (means[0] - means[2]).abs().max() < 0.02 and (means[1] - means[2]).abs().max() < 0.02
    colors = render(SCENES[3:4], 64).flatten(2)[0].T.unique(dim=0)
    assert len(colors) > 3  # the two, and mixtures at the edge
