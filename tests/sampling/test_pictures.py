"""Captions stay within their room, and what the font lacks is known."""

import pytest

from sampling import pictures


@pytest.mark.parametrize("text", ["red heart", "", "three word lines, no more " * 3000, "x" * 5000, "a " + "y" * 90])
def test_lines_fit_and_lose_nothing_but_the_end(text):
    lines = pictures.wrapped(text, 60, 4)
    assert 1 <= len(lines) <= 4 and all(pictures.FONT.getlength(line) <= 60 for line in lines)
    kept, whole = "".join(lines).removesuffix("…").replace(" ", ""), text.replace(" ", "")
    assert whole.startswith(kept) and (kept == whole or lines[-1].endswith(" …"))


def test_letters_lose_their_accents_and_other_scripts_are_boxes():
    assert pictures.wrapped("piñata", 60, 1) == ["pinata"]
    assert pictures.boxes("piñata, 红心 and 红") == ["红", "心"]
