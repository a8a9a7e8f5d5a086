"""What goes wrong in weeks of training, done on purpose: no run is lost, no traceback shown, no foreign code run.

Each line of this table breaks one thing in a run and lets it go on, or be started again; it must then end with the very
weights of a run that nothing happened to, or stop with one line that says what to do. What else can break is tested
where it belongs: hung and killed data workers, vanished shards, hostile images and captions in test_data.py and
test_pairs.py, kill −9 and two machines by torture.py and two_machines.py.
"""

import contextlib
import os
import resource
import shutil

import pytest
import torch

import train
from common.cli import UserError
from step import Learner
from tests.training.test_train import (  # noqa: F401 - some are fixtures
    COMMON,
    assert_identical,
    quick_preset,
    run,
    set_quick_preset,
)
from tests.training.torture import torture
from training import loop
from weights import checkpoint


@pytest.fixture(scope="module")
def common():
    """The arguments of every run here."""
    return (*COMMON, "--preset", "quick", "--sample-every", 100, "--save-every", 1)


@pytest.fixture(scope="module")
def undisturbed(common, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        set_quick_preset(patch)
        run(*common, "--out", out, "--steps", 5, "--keep", 9)
    return out


@pytest.fixture
def expected(undisturbed):
    return state_of(undisturbed)


@pytest.fixture
def three_steps(undisturbed, tmp_path):
    """The same run's folder as it was after its third step."""
    out = shutil.copytree(undisturbed, tmp_path / "run")
    for path in checkpoint.checkpoints(out / "checkpoints")[:2]:
        path.unlink()
    return out


def state_of(out):
    state = checkpoint.newest_run(out / "checkpoints", print)[1]
    state["progress"].pop("seconds")
    return state


def full_disk(room=100_000):
    """From here on no file can grow beyond `room` bytes, so that a checkpoint fails midway, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))


def room_again():
    full_disk(resource.RLIM_INFINITY)


@contextlib.contextmanager
def room_afterwards():
    """Frees the disk before pytest reports the test, as its report may go to a file, too."""
    try:
        yield
    finally:
        room_again()


@pytest.fixture
def at_step(monkeypatch):
    """at_step({2: f}) calls f(learner) as step 2 begins."""

    def plan(actions):
        step = Learner.step

        def disturbed(self, number, micro_batches):
            actions.get(number, lambda _: None)(self)
            return step(self, number, micro_batches)

        monkeypatch.setattr(Learner, "step", disturbed)

    return plan


def test_a_disk_that_is_full_for_a_while(tmp_path, common, expected, at_step, capsys):
    at_step({2: lambda _: full_disk(), 4: lambda _: room_again()})
    with room_afterwards():
        run(*common, "--out", tmp_path / "run", "--steps", 5)
    assert "a checkpoint could not be written" in capsys.readouterr().out
    assert_identical(state_of(tmp_path / "run"), expected)
    assert not list((tmp_path / "run").glob("**/*.tmp"))


def test_a_disk_that_stays_full(tmp_path, common, expected, at_step):
    actions = {2: lambda _: full_disk()}
    at_step(actions)
    message = r"step 5 is not saved; the last good checkpoint: .*0000000[12]-\w+\.pt"
    with room_afterwards(), pytest.raises(UserError, match=message):
        run(*common, "--out", tmp_path / "run", "--steps", 5)
    actions.clear()
    run(*common, "--out", tmp_path / "run", "--steps", 5)
    assert_identical(state_of(tmp_path / "run"), expected)


@pytest.mark.parametrize("room", [1000, 300_000], ids=["for nothing", "for the reference"])
def test_a_disk_that_is_full_from_the_start(tmp_path, common, run_main, room):
    options = ("--workers", 0, "--device", "cpu", "--steps", 2)
    with room_afterwards():
        full_disk(room)
        status, _, stderr = run_main(train.main, *common, *options, "--out", tmp_path / "run")
    assert status == 2 and stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in stderr
    assert "same command again" in stderr and not list((tmp_path / "run").glob("**/*.tmp"))


@pytest.mark.parametrize("tenths", range(10))
def test_a_checkpoint_cut_short_is_put_aside(three_steps, tenths):
    path, before = checkpoint.checkpoints(three_steps / "checkpoints")[:2]
    path.write_bytes(path.read_bytes()[: path.stat().st_size * tenths // 10])
    assert checkpoint.newest_run(path.parent, print)[0] == before
    assert path.with_name(f"{path.name}.damaged").exists()


def test_a_run_goes_on_from_the_checkpoint_before(three_steps, common, expected):
    path = checkpoint.checkpoints(three_steps / "checkpoints")[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run(*common, "--out", three_steps, "--steps", 5)
    assert path.with_name(f"{path.name}.damaged").exists()
    assert_identical(state_of(three_steps), expected)


def test_a_bit_of_a_checkpoint_flipped(tmp_path):
    """Any bit of a file; torch.load would pass most of them, and so would the checksums that torch.save writes."""
    state = {"identity": {"seed": 5}, "progress": {"step": 3}, "discriminator": {"weight": torch.randn(9)}}
    path = checkpoint.save_run(tmp_path, 3, state, keep=1)
    content = path.read_bytes()
    assert_identical(checkpoint.load_run(path), state)
    for bit in range(0, 8 * len(content), 7):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match="is damaged"):
            checkpoint.load_run(path)


@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_weights_that_become_nan(tmp_path, common, expected, at_step, monkeypatch, network):
    """The run stops, names its last good checkpoint, and goes on from there."""
    monkeypatch.setattr(loop, "MOST_REJECTED", 4)

    def poison(learner):
        next(getattr(learner, network).parameters()).data.fill_(float("nan"))

    actions = {2: poison}
    at_step(actions)
    with pytest.raises(UserError, match=r"updates in a row .* last good checkpoint: .*00000002-\w+\.pt"):
        run(*common, "--out", tmp_path / "run", "--steps", 100)
    actions.clear()
    run(*common, "--out", tmp_path / "run", "--steps", 5)
    assert_identical(state_of(tmp_path / "run"), expected)


@pytest.mark.parametrize("poisoned_step", [2, 4], ids=["in the middle", "in the last step"])
def test_data_that_is_nan_costs_one_update(tmp_path, common, monkeypatch, capsys, poisoned_step):
    """And no other: all of the run is saved, as its weights are finite."""
    prepare = Learner.prepare

    def poisoned(self, seed, number, batches):
        parts = prepare(self, seed, number, batches)
        if number == poisoned_step:
            parts[0].real[4][0, 0, 0, 0] = float("nan")
        return parts

    monkeypatch.setattr(Learner, "prepare", poisoned)
    training = run(*common, "--out", tmp_path, "--steps", 5, "--save-every", 100)
    assert training.loop.progress.rejected == 1 and "1 updates were left out as not finite" in capsys.readouterr().out
    assert training.learner.weights_are_finite() and state_of(tmp_path)["progress"]["step"] == 5


def test_a_checkpoint_that_holds_code(tmp_path, three_steps, common, expected):
    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    folder = three_steps / "checkpoints"
    torch.save({name: Hostile() for name in ("identity", "progress", "discriminator")}, folder / "hostile")
    path = (folder / "hostile").rename(folder / f"00000004-{checkpoint.digest(folder / 'hostile')}.pt")
    with pytest.raises(UserError, match="holds code, which is not run"):
        checkpoint.load_run(path)
    run(*common, "--out", three_steps, "--steps", 5)
    assert_identical(state_of(three_steps), expected)
    assert not (tmp_path / "executed").exists()


@pytest.mark.tour
def test_kills_at_random_moments(tmp_path):
    """The short form of torture.py."""
    torture(ranks=1, kills=2, steps=20, folder=tmp_path)
