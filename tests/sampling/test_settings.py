"""What the page sets is drawn as Pipeline and views draw it, and its sheet is where the mouse says."""

import base64
import dataclasses
import io

import pytest
import torch
from PIL import Image

from common.cli import UserError
from sampling import latent, settings, views
from sampling.pipeline import Pipeline
from sampling.settings import Forced, Settings
from sampling.sheet import GAP, Point, Sheet


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load(device="cpu")


@pytest.fixture
def draw(pipe):
    """Settings of "red heart", with changes → Drawn."""
    return lambda **changes: settings.draw(pipe, Settings("red heart", seed=3, num=2, **changes))


def test_plain_settings_draw_what_the_pipeline_draws_to_the_bit(pipe, draw):
    assert torch.equal(draw().images, pipe.draw(pipe.frames("red heart", num=2, seed=3)).images)
    assert torch.equal(draw(psi=0.5).images, pipe.draw(pipe.frames("red heart", num=2, seed=3, psi=0.5)).images)


@pytest.mark.parametrize("part", ["both", "global", "local"])
def test_the_way_between_two_prompts_is_that_of_views(pipe, part):
    half = settings.frames(
        pipe.generator, pipe.clip, Settings("red heart", 3, 1, second="whale", amount=0.5, part=part)
    )
    with torch.no_grad():
        prompts = ("red heart", "whale")
        way = views.interpolation(pipe.generator, pipe.clip, prompts, 3, 1.0, 3, part, "spherical")
    torch.testing.assert_close(half[0].w, way[1].w)
    torch.testing.assert_close(half[0].local_text, way[1].local_text)


def test_chosen_layers_follow_the_second_prompt(pipe):
    wanted = Settings("red heart", 3, 2, second="whale")
    first, second, mixed = (
        settings.frames(pipe.generator, pipe.clip, s)
        for s in (wanted, dataclasses.replace(wanted, prompt="whale"), dataclasses.replace(wanted, layers=(0, 2)))
    )
    for a, b, m in zip(first, second, mixed, strict=True):
        assert torch.equal(m.w[[0, 2]], b.w[[0, 2]]) and torch.equal(m.w[[1, 3]], a.w[[1, 3]])
        assert torch.equal(m.local_text, a.local_text)


def test_a_walk_goes_from_seed_to_seed_and_likeness_is_near(pipe):
    generator = pipe.generator
    assert torch.equal(settings.codes(generator, Settings("", 3, 2, walk=2.0)), latent.noise(generator, 2, 5))
    between = settings.codes(generator, Settings("", 3, 2, walk=1.5))
    ends = latent.noise(generator, 2, 4), latent.noise(generator, 2, 5)
    assert all(torch.cosine_similarity(between, end).min() > 0.5 for end in ends)
    centre = latent.noise(generator, 3, 9)[2]
    near = settings.codes(generator, Settings("", 3, 4, centre=centre))
    assert torch.equal(near[0], centre) and torch.cosine_similarity(near, centre[None]).min() > 0.8
    assert len(near.unique(dim=0)) == 4


def test_a_forced_expert_is_another_picture(draw):
    free = draw()
    points = free.routings["8.0.0"].expert_index == 3
    forced = draw(forced=Forced("8.0.0", points, 0))
    assert (forced.routings["8.0.0"].expert_index[points] == 0).all()
    assert not torch.equal(forced.images, free.images) and torch.equal(draw().images, free.images)


def test_no_prompt_is_told(pipe):
    with pytest.raises(UserError, match="say what to draw"):
        settings.draw(pipe, Settings("  "))


@pytest.mark.parametrize("num", [1, 3, 5, 16])
def test_every_point_of_a_sheet_is_found_where_it_is_drawn(num):
    sheet, points_a_side = Sheet(num, 32), 8
    images = [Image.new("RGB", (32, 32), (i, 0, 0)) for i in range(num)]
    joined = Image.open(io.BytesIO(base64.b64decode(sheet.joined(images).partition(",")[2])))
    assert joined.size == sheet.size
    for picture in range(num):
        left, top = sheet.corner(picture)
        assert joined.getpixel((left + 31, top + 31)) == (picture, 0, 0)
        for index in (0, 7, 20, 63):
            row, column = divmod(index, points_a_side)
            assert sheet.point_at(left + column * 4 + 3.9, top + row * 4, points_a_side) == Point(picture, index)
            mask = torch.zeros(num, 64, dtype=torch.bool)
            mask[picture, index] = True
            assert sheet.squares(mask) == f"M{left + column * 4} {top + row * 4}h4v4h-4z"
    assert sheet.point_at(32 + GAP / 2, 5, 8) is None and sheet.point_at(-1, 5, 8) is None
    assert sheet.point_at(5, 10_000, 8) is None


def test_the_overlay_has_every_point_once():
    index = torch.randint(4, (2, 64))
    overlay = Sheet(2, 32).experts(index, 4, seen=1)
    assert overlay.count("M") == 128 and overlay.count("<path") == 4 and overlay.count('fill-opacity="0.7"') == 1
