"""Steps replayed from CUDA graphs, compared with the same steps launched kernel by kernel."""

import pytest
import torch

from clip import load_clip
from common import distributed
from data import sources
from losses import R1_INTERVAL
from step import OPTIMIZERS, Learner
from tests.figures import TINY, Figures
from training.cuda_graph import WARM_UP

STEPS = WARM_UP * R1_INTERVAL + 4  # the fourth from the end is the first that is replayed, with R1


def learner_after(steps, lr, eager):
    """→ the learner, and the reports of its steps."""
    device = distributed.start("cuda")
    clip = load_clip("emoji", device)
    torch.manual_seed(0)
    learner = Learner(TINY, clip, device, torch.float32, batch=4)
    for network in (learner.generator, learner.discriminator):
        for parameter in network.parameters():
            if not parameter.any():
                parameter.data.normal_(std=0.1)  # otherwise to-RGB, which starts at zero, hides most of the network
    learner.learn_at([4, 8])
    if eager:
        learner.updater = learner.update_networks
    for name in OPTIMIZERS:
        for group in getattr(learner, name).param_groups:
            group["lr"] *= lr
    batches = sources.loader(Figures(8), 0, 4, 0)
    reports = []
    for number in range(steps):
        report = learner.step(number, learner.prepare(0, number, [next(batches)]))
        reports.append({name: value.item() for name, value in report.items()})
    return learner, reports


@pytest.mark.gpu
def test_losses_and_gradients_are_those_of_the_step():
    """The weights do not change: otherwise rounding soon sends a point to another expert."""
    (one, expected), (other, found) = (learner_after(STEPS, 0, eager) for eager in (True, False))
    assert len(other.updater.recorded) == 2  # without R1 and with it
    for row, same in zip(expected, found, strict=True):
        assert row == pytest.approx(same, rel=1e-3, abs=1e-4)
    for name in OPTIMIZERS:
        for a, b in zip(getattr(one, name).state.values(), getattr(other, name).state.values(), strict=True):
            for moment in ("exp_avg", "exp_avg_sq"):  # the last gradient, and the mean of all squares
                assert (a[moment] - b[moment]).norm() <= 1e-3 * a[moment].norm() + 1e-6


@pytest.mark.gpu
def test_a_replayed_step_learns():
    learner, _ = learner_after(STEPS, 1, eager=False)
    before = [p.detach().clone() for p in learner.generator.mapping.parameters()]
    batch = next(sources.loader(Figures(8, seed=1), 0, 4, 0))
    report = learner.step(STEPS, learner.prepare(0, STEPS, [batch]))
    assert all(value.isfinite() for value in report.values())
    assert not any(torch.equal(a, b) for a, b in zip(before, learner.generator.mapping.parameters(), strict=True))
