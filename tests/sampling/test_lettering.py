"""Captions in any script are drawn, and stay within their room."""

import pytest
from PIL import Image, ImageDraw
from PIL import ImageFont as fonts

from sampling import lettering

TEXTS = [
    "red heart",
    "红心",
    "赤いハート",
    "빨간 하트",
    "קלב",
    "हृदय",
    "หัวใจ",
    "сердце ψ×",
    "🐧👩🏿‍🚀🇫🇷",
    "❤️ 3 cats 🐈‍⬛ 猫",
]


@pytest.mark.parametrize("text", TEXTS)
def test_no_character_is_a_box(text):
    """Against fontTools, which reads which characters a font file has."""
    tables = pytest.importorskip("fontTools.ttLib")
    assert not lettering.missing(text)
    assert "".join(stretch for _, stretch in lettering.runs(text)) == text
    for font, stretch in lettering.runs(text):
        has = tables.TTFont(font.path, fontNumber=0, lazy=True).getBestCmap()
        assert all(ord(c) in has for c in lettering.INVISIBLE.sub("", stretch))


def test_what_no_font_has_is_named_once():
    assert lettering.missing("ab 𒀀 c 𒀀 ꧁") == ["𒀀", "꧁"]


@pytest.mark.parametrize("text", [*TEXTS, "", "word " * 3000, "x" * 5000, "红心" * 400])
def test_lines_fit_and_lose_nothing_but_the_end(text):
    lines = lettering.wrapped(text, 60, 4)
    assert 1 <= len(lines) <= 4 and all(lettering.width(line) <= 60 for line in lines)
    kept = "".join(lines).removesuffix("…")
    whole = text.replace(" ", "")
    assert whole.startswith(kept.replace(" ", "")) and (kept.replace(" ", "") == whole or lines[-1].endswith(" …"))


def test_plain_text_is_drawn_as_pillow_draws_it():
    ours, theirs = Image.new("L", (120, 16), "white"), Image.new("L", (120, 16), "white")
    lettering.write(ImageDraw.Draw(ours), (2, 0), ["red heart"])
    font = fonts.truetype(lettering.paths()[0], lettering.SIZE)
    ImageDraw.Draw(theirs).text((2, 0), "red heart", fill="black", font=font)
    assert ours.tobytes() == theirs.tobytes() and min(ours.tobytes()) < 100
