"""Faults of long trainings, made on purpose: no run is lost, and no traceback is shown.

Each test breaks one thing in a run that goes on or is started again. The run must end with the same weights as an
undisturbed one, or stop with one line that says what to do. Other faults: killed data workers, vanished
shards, hostile images and captions in tests/data, damaged checkpoints in tests/weights, kill −9 in torture.py.
"""

import contextlib
import resource

import pytest

import train
from common import disk
from common.cli import UserError
from step import Learner
from tests.training.runs import SHORT, identical, run, state_of
from tests.training.torture import torture
from training import loop


def before_step(monkeypatch, number, call):
    """Calls call(learner, micro_batches) as this step begins."""
    step = Learner.step

    def disturbed(learner, its_number, micro_batches):
        if its_number == number:
            call(learner, micro_batches)
        return step(learner, its_number, micro_batches)

    monkeypatch.setattr(Learner, "step", disturbed)


@contextlib.contextmanager
def full_disk(room=100_000):
    """A context in which no file grows beyond `room` bytes, so that a checkpoint fails midway, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_disk_that_is_full_for_a_while(undisturbed, stopped_after, monkeypatch, capsys):
    out = stopped_after(2)
    with contextlib.ExitStack() as stack:
        before_step(monkeypatch, 2, lambda *_: stack.enter_context(full_disk()))
        before_step(monkeypatch, 4, lambda *_: stack.close())
        run(*SHORT, "--out", out, "--steps", 5)
    assert "a checkpoint could not be written" in capsys.readouterr().out
    assert identical(state_of(out), state_of(undisturbed)) and not list(out.glob("**/*.unfinished"))


def test_a_disk_that_stays_full(undisturbed, stopped_after, monkeypatch):
    out = stopped_after(3)
    with contextlib.ExitStack() as stack:
        before_step(monkeypatch, 3, lambda *_: stack.enter_context(full_disk()))
        with pytest.raises(UserError, match=r"step 5 is not saved; the last good checkpoint: .*00000003-"):
            run(*SHORT, "--out", out, "--steps", 5)
    monkeypatch.undo()
    run(*SHORT, "--out", out, "--steps", 5)
    assert identical(state_of(out), state_of(undisturbed))


def test_a_disk_that_is_full_from_the_start(tmp_path, run_main):
    with full_disk(1000):
        status, _, stderr = run_main(train.main, *SHORT, "--steps", 2, "--out", tmp_path / "run")
        with pytest.raises(OSError) as error:
            disk.write_text(tmp_path / "a.txt", 2000 * "a")
    assert error.value.filename == str(tmp_path / "a.txt") and not list(tmp_path.glob("**/*.unfinished"))
    assert status == 2 and stderr.splitlines()[-1].startswith("error: step 0 is") and "Traceback" not in stderr


def test_weights_that_become_nan(undisturbed, stopped_after, monkeypatch):
    """The run stops, names its last good checkpoint, and goes on from there."""
    monkeypatch.setattr(loop, "MOST_REJECTED", 4)

    def poison(learner, _):
        next(learner.discriminator.parameters()).data.fill_(float("nan"))

    out = stopped_after(3)
    before_step(monkeypatch, 3, poison)
    with pytest.raises(UserError, match=r"updates in a row .* last good checkpoint: .*00000003-\w+"):
        run(*SHORT, "--out", out, "--steps", 100)
    monkeypatch.undo()
    run(*SHORT, "--out", out, "--steps", 5)
    assert identical(state_of(out), state_of(undisturbed))


def test_data_that_is_nan_costs_one_update(stopped_after, monkeypatch, capsys):
    """All other updates are made, and the run is saved, because its weights are finite."""
    out = stopped_after(3)
    before_step(monkeypatch, 4, lambda _, micro_batches: micro_batches[0].real[4].fill_(float("nan")))
    made = run(*SHORT, "--out", out, "--steps", 5)
    assert made.loop.progress.rejected == 1 and "1 updates were skipped" in capsys.readouterr().out
    assert made.learner.weights_are_finite() and state_of(out)["progress"]["step"] == 5
    updates = {int(its["step"]) for its in made.learner.optimizer_d.state.values()}
    assert updates == {4, 2}  # Adam counts one less than the five steps, or the three since 8×8


@pytest.mark.tour
def test_kills_at_random_moments(tmp_path):
    torture(ranks=1, kills=2, steps=20, folder=tmp_path)
