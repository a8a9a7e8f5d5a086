"""The loop with a system that does nothing: what it saves, and when."""

from collections import Counter
from types import SimpleNamespace

import torch
from PIL import Image

from data.batches import Batch, Stopped
from training import loop
from training.run_folder import RunFolder
from weights import checkpoint


class Idle:
    """A system that learns nothing."""

    batch, parts, phase, device = 2, 1, "idle", torch.device("cpu")

    def step(self, number, batches):
        return {"d_loss": torch.zeros(())}

    def after_step(self, number):
        return {}

    def weights_are_finite(self):
        return True

    def state_dict(self):
        return {}

    def draw_samples(self):
        return Image.new("RGB", (4, 4)), {}

    def save_generator(self, path, notes):
        path.write_bytes(b"generator")


def test_a_run_that_is_stopped_while_its_data_stall_is_saved(tmp_path, monkeypatch):
    def stalling(*_, **__):
        yield from [Batch(None, [], Counter())] * 3
        raise Stopped

    monkeypatch.setattr(loop.sources, "loader", stalling)
    folder = RunFolder(tmp_path, {"seed": 0})
    folder.state("auto")
    options = SimpleNamespace(workers=0, sample_every=100, save_every=100, save_minutes=15, keep=3)
    loop.Loop(Idle(), folder, None, 9, options).run()
    assert folder.saved_step == 3
    assert checkpoint.newest_run(folder.checkpoints, print)[1]["progress"]["step"] == 3
