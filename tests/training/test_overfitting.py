"""The watch on a discriminator that learns its images by heart."""

import contextlib

import torch

from clip import load_clip
from common import distributed
from data.sources import Batch
from training.overfitting import OverfittingWatch


class Source:
    """Black images to learn from, and white ones that are held out."""

    def evaluation(self, batch=64, held_out=False):
        yield Batch(torch.full((batch, 3, 32, 32), 1.0 if held_out else -1.0), ["a red circle"] * batch, {})


class Learner:
    """Scores an image by how dark it is; its generated images are grey."""

    def __init__(self):
        self.active = [32]
        self.generator = self.ema = self
        self.config = type("Config", (), {"z_dim": 4})
        self.autocast, self.sizes = contextlib.nullcontext, []

    def __call__(self, z, *_):
        return type("Output", (), {"pyramid": {32: torch.zeros(len(z), 3, 32, 32)}})

    def score(self, images, text):
        self.sizes.append(len(images[32]))
        return -images[32].mean((1, 2, 3))


def test_the_ratio_is_that_of_ada_and_is_told_once(capsys):
    """(D(seen) − D(held out)) / (D(seen) − D(generated)) = (1 − −1) / (1 − 0)."""
    watch = OverfittingWatch(Source(), load_clip("emoji"))
    for _ in range(2):
        report = watch.measure(Learner(), seed=0)
    assert report == {"logits_seen": 1, "logits_held_out": -1, "logits_generated": 0, "overfitting": 2}
    assert capsys.readouterr().out.count("by heart") == 1


def test_ranks_share_the_images_in_small_batches(monkeypatch):
    """Of 128 two ranks take 64 each, 16 at a time. The other's sums are added, here as this one's once more."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    learner = Learner()
    report = OverfittingWatch(Source(), load_clip("emoji")).measure(learner, seed=0)
    assert learner.sizes == 12 * [16] and report["overfitting"] == 2


def test_without_held_out_pairs_there_is_nothing_to_tell():
    source = Source()
    source.evaluation = lambda batch, held_out=False: iter([]) if held_out else Source().evaluation(batch)
    assert OverfittingWatch(source, load_clip("emoji")).measure(Learner(), seed=0) == {}
