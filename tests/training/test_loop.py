"""The loop with a system that does nothing: what it saves, and when."""

import itertools
from collections import Counter
from types import SimpleNamespace

import torch
from PIL import Image

from data.sources import Batch, Stopped
from training import loop
from training.run_folder import RunFolder
from weights import checkpoint

LOSS = {"d_loss": torch.zeros(())}
OPTIONS = SimpleNamespace(workers=0, sample_every=100, save_every=100, save_minutes=15, keep=3)


class Idle:
    """A system that learns nothing."""

    batch, parts, phase, device = 2, 1, "idle", torch.device("cpu")

    def step(self, number, batches):
        return LOSS

    def after_step(self, number):
        return {}

    def weights_are_finite(self):
        return True

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def draw_samples(self):
        return Image.new("RGB", (4, 4)), {}

    def save_generator(self, path, state, notes):
        path.write_bytes(b"generator")


def test_a_run_that_is_stopped_while_its_data_stall_is_saved(tmp_path, monkeypatch):
    def stalling(*_, **__):
        yield from [Batch(None, [], Counter())] * 3
        raise Stopped

    monkeypatch.setattr(loop.sources, "loader", stalling)
    folder = RunFolder(tmp_path, {"seed": 0})
    folder.state("auto")
    loop.Loop(Idle(), folder, None, OPTIONS, lambda: False, steps=9).run()
    assert folder.saved_step == 3
    assert checkpoint.newest_run(folder.checkpoints, print)[1]["progress"]["step"] == 3


def test_a_run_whose_minutes_are_over_makes_no_step_more(tmp_path, monkeypatch, capsys):
    batches = itertools.repeat(Batch(None, [], Counter()))
    monkeypatch.setattr(loop.sources, "loader", lambda *_, **__: batches)
    folder = RunFolder(tmp_path, {"seed": 0})
    folder.state("auto")
    for minutes, steps in ((1, 2), (1, 2), (3, 4)):  # stopped in the step after; begun again; given more
        run = loop.Loop(Idle(), folder, None, OPTIONS, lambda: False, minutes=minutes)
        if checkpoint.checkpoints(folder.checkpoints):
            run.load(checkpoint.newest_run(folder.checkpoints, print)[1])
        run.system.after_step = lambda number, run=run: take_a_minute(run.progress)
        run.run()
        run.conclude()
        assert run.progress.step == steps and f"Its {minutes} minutes are over" in capsys.readouterr().out


def take_a_minute(progress):
    progress.seconds += 61
    return {}
