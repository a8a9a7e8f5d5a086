"""The loop without networks: its reports, and when it ends, saves and warns."""

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from clip import load_clip
from common.stopping import Stopped
from data.pairs import FORMAT
from data.sources import Batch
from step import Learner
from tests.figures import QUICK
from training import loop
from training.loop import Loop, overfitting, watched_pairs
from training.run_folder import RunFolder

OPTIONS = SimpleNamespace(workers=0, sample_every=100, save_every=100, save_minutes=15, keep=3)
BATCH = Batch(None, [], Counter({FORMAT: 2}))
HEALTHY = {"expert_min_share": 0.5, "logits_real": 1.0, "logits_fake": -1.0}


def run(tmp_path, monkeypatch, batches, state=None, minutes_a_step=0, **ends):
    """Runs to the end without networks, from the start or from a state → the loop."""
    monkeypatch.setattr(loop.sources, "loader", lambda *_, **__: iter(batches))
    folder = RunFolder(tmp_path, {"seed": 0})
    folder.state()
    made = Loop(folder, OPTIONS, batch=2, **ends)
    if state:
        with made.resuming(state):
            pass
    for _, its_batches in made.steps(None):
        report = made.count({"d_loss": torch.zeros(())}, its_batches)
        made.progress.seconds += 61 * minutes_a_step
        made.log(report | {"resolution": 4})
    made.save({}, ({"generator.weight": torch.zeros(1)}, {}))
    return made


def test_a_run_stopped_while_its_data_stall_is_saved(tmp_path, monkeypatch):
    def stalling():
        yield from [BATCH] * 3
        raise Stopped

    made = run(tmp_path, monkeypatch, stalling(), last_step=9)
    with pytest.raises(Stopped):
        made.conclude()
    assert made.folder.saved_step == 3 and made.progress.skipped == Counter({FORMAT: 6})


def test_a_run_whose_minutes_are_over_makes_no_more_steps(tmp_path, monkeypatch, capsys):
    state = None
    for minutes, steps in ((1, 2), (1, 2), (3, 4)):  # stopped one step later; started again; given more
        made = run(tmp_path, monkeypatch, itertools.repeat(BATCH), state, minutes_a_step=1, minutes=minutes)
        made.conclude()
        assert made.progress.step == steps and "more --minutes resume the run" in capsys.readouterr().out
        state = RunFolder(tmp_path, {"seed": 0}).state()


def test_a_checkpoint_is_due_after_some_steps_or_minutes(tmp_path, monkeypatch):
    made = Loop(RunFolder(tmp_path, {}), OPTIONS, batch=2)
    made.saved_at, now = 0, 0
    monkeypatch.setattr(loop.time, "monotonic", lambda: now)
    for step, now, due in ((99, 900, False), (100, 0, True), (101, 901, True)):  # noqa: B007 - read above
        made.progress.step = step
        assert made.saves == due


def test_lasting_symptoms_are_reported_once(tmp_path, monkeypatch):
    lines, sick = [], HEALTHY | {"expert_min_share": 0.0, "logits_real": 9.0, "logits_fake": -9.0}
    monkeypatch.setattr(loop, "say", lines.append)
    monkeypatch.setattr(loop, "LASTING", 3)
    watched = Loop(RunFolder(tmp_path, {}), OPTIONS, batch=2)
    for report in (sick, sick, HEALTHY, sick, sick):
        watched.warn(report)
    assert not lines
    for report in (sick, sick, *3 * [HEALTHY | {"logits_real": -1.0}], HEALTHY | {"overfitting": 0.6}):
        watched.warn(report)
    words = "almost no points", "certain of every image", "no longer tells real from generated", "memorized"
    assert len(lines) == 4 and all(word in line for word, line in zip(words, lines, strict=True))


class Source:
    """Black images to learn from, and white ones held out."""

    def evaluation_batches(self, batch=64, held_out=False):
        yield Batch(torch.full((batch, 3, 32, 32), 1.0 if held_out else -1.0), ["a red circle"] * batch, {})


def test_overfitting_is_adas_ratio(monkeypatch):
    """(D(seen) − D(held out)) / (D(seen) − D(generated)) = (1 − −1) / (1 − 0): D says how dark an image is, and
    untrained networks draw grey.
    """
    clip = load_clip("emoji")
    learner = Learner(QUICK, clip, torch.device("cpu"), torch.float32, 4)
    monkeypatch.setattr(learner, "score", lambda images, text: -images[8].mean((1, 2, 3)))
    pairs = watched_pairs(Source(), clip, group=100)
    report = overfitting(learner, pairs, seed=0)
    assert [len(images) for images, _ in pairs] == [100, 100] and watched_pairs(Source(), clip, group=200) is None
    assert report == {"logits_seen": 1, "logits_held_out": -1, "logits_generated": 0, "overfitting": 2}
    monkeypatch.setattr(learner, "score", lambda images, text: images[8].mean((1, 2, 3)))  # seen ones look generated
    assert "overfitting" not in overfitting(learner, pairs, seed=0)
