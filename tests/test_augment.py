"""Differentiable augmentation against its definitions, and the same change at every resolution."""

import pytest
import torch
import torch.nn.functional as F

from augment import NUM_CHANCES, POLICIES, augment


def chances(**values):
    """All in the middle, which changes nothing but the cutout, except some columns."""
    u = torch.full((1, NUM_CHANCES), 0.5, dtype=torch.float64)
    for column, value in values.items():
        u[:, int(column[1:])] = value
    return u


IMAGE = torch.rand(1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("resolution", (16, 32))  # of a crop, an image is smaller than its resolution
def test_translation_moves_by_whole_pixels_and_leaves_grey(resolution):
    some = chances(c0=0.9, c1=0.25)  # 1.6 pixels of 16 to the right, one up
    moved = augment({resolution: IMAGE}, ("translation",), some)[resolution]
    torch.testing.assert_close(moved, F.pad(IMAGE, (2, 0, 0, 1))[..., 1:, :16])


def test_a_pyramid_moves_as_a_whole():
    """A spot's centre of mass moves by the same share of the side at 4×4 as at 64×64: by seven pixels of 64 here."""
    spots = {r: torch.zeros(1, 3, r, r, dtype=torch.float64) for r in (4, 16, 64)}
    for r, x in spots.items():
        x[..., r // 2 - r // 4 : r // 2 + r // 4, r // 2 - r // 4 : r // 2 + r // 4] = 1
    for r, x in augment(spots, ("translation",), chances(c0=0.5 + 7 / 16)).items():
        places = (torch.arange(r) + 0.5) / r - 0.5
        assert (x[0, 0].sum(0) * places).sum() / x[0, 0].sum() == pytest.approx(7 / 64, abs=1e-12), r


def test_scale_enlarges_about_the_centre():
    """A ramp stays one, and what was at distance d from the centre is now at d times the factor."""
    ramp = torch.arange(64, dtype=torch.float64).expand(1, 3, 64, 64)
    for chance, factor in ((0.0, 1 / 1.2), (0.5, 1), (1.0, 1.2)):
        scaled = augment({64: ramp}, ("scale",), chances(c2=chance))[64]
        torch.testing.assert_close(scaled[..., 8:56, 8:56], (ramp[..., 8:56, 8:56] - 31.5) / factor + 31.5)


def test_color_is_brightness_then_saturation_then_contrast():
    bright = IMAGE + (0.9 - 0.5)
    grey = bright.mean(1, keepdim=True)
    saturated = grey + (bright - grey) * 2 * 0.2
    mean = saturated.mean((1, 2, 3), keepdim=True)
    changed = augment({16: IMAGE}, ("color",), chances(c3=0.9, c4=0.2, c5=0.7))[16]
    torch.testing.assert_close(changed, mean + (saturated - mean) * 1.2)


def test_cutout_is_a_square_of_half_the_side_at_the_same_place_of_each_image():
    pyramid = {r: torch.rand(1, 3, r, r) for r in (8, 16)}
    for r, cut in augment(pyramid, ("cutout",), chances(c6=0.5, c7=0.25).float()).items():
        hole = torch.zeros(r, r, dtype=torch.bool)
        hole[: r // 2, r // 4 : 3 * r // 4] = True  # rows about a quarter of the height, columns about the middle
        assert (cut[..., hole] == 0).all() and torch.equal(cut[..., ~hole], pyramid[r][..., ~hole])


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_reach_the_image_and_the_same_chances_do_the_same(policy):
    u = torch.rand(1, NUM_CHANCES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pyramid = {r: F.interpolate(IMAGE, r, mode="area").requires_grad_() for r in (8, 16)}
    first, second = (augment(pyramid, (policy,), u) for _ in range(2))
    assert all(torch.equal(first[r], second[r]) for r in pyramid)
    sum(x.sum() for x in first.values()).backward()
    assert all(x.grad.abs().sum() > 0 for x in pyramid.values())


@pytest.mark.parametrize("policy", POLICIES)
def test_bfloat16_changes_nothing(policy):
    image, some = torch.rand(2, 3, 64, 64), torch.rand(2, NUM_CHANCES)
    with torch.autocast("cpu", torch.bfloat16):
        changed = augment({64: image}, (policy,), some)[64]
    assert torch.equal(changed, augment({64: image}, (policy,), some)[64])
