"""The tour: its lines are where it says, and its experiments run; `python -m pytest -m tour` runs them in full."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TOUR = (ROOT / "TOUR.md").read_text(encoding="utf-8")
PLACES = re.findall(r"\[`([^`]+)`\]\(([\w./]+)#L(\d+)\)", TOUR)
EXPERIMENTS = dict(re.findall(r"\*\*([^*]+)\*\*[^`]*?```python\n(.*?)```", TOUR.replace("*w*", "w"), re.DOTALL))


@pytest.mark.parametrize(("what", "file", "line"), PLACES)
def test_every_box_is_at_its_line(what, file, line):
    assert what in (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def test_all_experiments_are_found():
    assert len(EXPERIMENTS) == TOUR.count("```python") >= 8 and len(PLACES) > 35


def run(code, timeout):
    """Each in a process of its own, as a reader would."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs(name):
    short = re.sub(r"\AN = \d+", "N = 16", EXPERIMENTS[name])
    assert short != EXPERIMENTS[name]
    assert run(short, timeout=60).strip()


@pytest.mark.tour
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_takes_less_than_a_minute(name):
    print(f"\n{name}\n{run(EXPERIMENTS[name], timeout=60)}")
