"""The tour: its names are where it says, and its experiments run; `python -m pytest -m tour` runs them in full."""

import ast
import re
import subprocess
import sys

import pytest

from tests import ROOT

TOUR = (ROOT / "TOUR.md").read_text(encoding="utf-8")
PLACES = re.findall(r"\[`([\w.]+)`\]\(([\w./]+\.py)\)", TOUR)
FORM = r"\*\*([^*]+)\*\*[^`]*?```python\n(.*?)```\n\n```text\n(.*?)```"
EXPERIMENTS = {name: parts for name, *parts in re.findall(FORM, TOUR.replace("*w*", "w"), re.DOTALL)}
NUMBER = re.compile(r"\d+(?:\.\d+)?(?![\d.]* ms)")  # but no time


@pytest.mark.parametrize(("name", "file"), PLACES)
def test_every_box_has_its_name_in_its_file(name, file):
    scope = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        scope = next(node.body for node in scope if getattr(node, "name", None) == part)


def test_all_experiments_are_found():
    assert len(EXPERIMENTS) == TOUR.count("```python") >= 8 and len(PLACES) > 35
    assert "#L" not in TOUR  # a line moves when a file grows above it


@pytest.mark.tour
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_gives_the_numbers_that_follow_it(name):
    """Each in a process of its own, as a reader would run it, in less than a minute. Times in ms are not compared."""
    code, expected = EXPERIMENTS[name]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found, expected = (list(map(float, NUMBER.findall(text))) for text in (done.stdout, expected))
    assert found == pytest.approx(expected, rel=0.2, abs=0.05), done.stdout
