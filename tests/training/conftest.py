"""An undisturbed run of five steps, which the tests of this folder share."""

import shutil

import pytest

from tests.training.runs import SHORT, run
from weights import checkpoint


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The folder of a run with a checkpoint of every step. It grows after the second."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(*SHORT, "--out", out, "--steps", 5)
    return out


@pytest.fixture
def stopped_after(undisturbed, tmp_path):
    """stopped_after(3) → the same run's folder as it was after its third step."""

    def stopped_after(steps):
        out = shutil.copytree(undisturbed, tmp_path / "a run")
        for path in checkpoint.checkpoints(out / "checkpoints"):
            if int(path.name.partition("-")[0]) > steps:
                shutil.rmtree(path)
        return out

    return stopped_after
