"""A recipe changed by words of the command line."""

import pytest

from common.cli import with_fields
from presets import PRESETS


def test_fields_keep_their_types():
    recipe = with_fields(PRESETS["emoji"].recipe, "--set", ["lr_generator=1e-3", "batch=8", "augment=()"])
    assert recipe.lr_generator == 1e-3 and recipe.batch == 8 and recipe.augment == ()
    assert with_fields(recipe, "--set", ["r1_gamma=2"]).r1_gamma == 2.0
    assert with_fields(recipe, "--set", ["augment=('color', 'scale')"]).augment == ("color", "scale")
    phases = {4: 0, 8: 10, 16: 0, 32: 1}
    assert with_fields(recipe, "--set", [f"images_per_phase={phases}"]).images_per_phase == phases


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("speed=2", "no field here; choose one of steps, batch"),
        ("batch=2.5", "with a value like 32"),
        ("fid_every=-1", "with a value like 16000"),
        ("images_per_phase={4: 0}", "with a value like {4: 0, 8: 0, 16: 96000, 32: 256000}"),
    ],
)
def test_mistakes_say_what_to_write(assignment, says):
    with pytest.raises(ValueError, match=says):
        with_fields(PRESETS["emoji"].recipe, "--set", [assignment])
