"""The layout of the repository: who may import whom."""

import ast
import sys

import pytest

from tests import ROOT

TRAINING = {"training", "step", "growth"}  # of which the step and the growth are Aurora, and are at the root
COMMANDS = {"train", "sample", "evaluate", "explore"}
LAYERS = [  # from the leaves up; a file imports from its own layer and from those before it
    {"common", "kernels"},
    {"data"},
    {path.stem for path in ROOT.glob("*.py")} - COMMANDS - TRAINING,  # Aurora's own pieces
    {"weights"},
    TRAINING | {"sampling", "evaluation"},
    {"baselines"},  # whole systems, each with its command
    COMMANDS,
    {"experiments"},
]
FILES = sorted(path for path in ROOT.rglob("*.py") if not {".venv", "tests"} & set(path.relative_to(ROOT).parts))


def layer_of(name):
    return next((number for number, names in enumerate(LAYERS) if name in names), None)


def imported(path):
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imported(path):
        other = module.split(".")[0]
        if other == own or other in sys.stdlib_module_names or (theirs := layer_of(other)) is None:
            continue
        assert theirs <= layer_of(own), f"{path.name} imports {module}, of a higher layer"
        assert not {own, other} <= COMMANDS, "a command imports no other command"
