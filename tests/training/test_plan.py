"""The plan's counts compared with formulas, and with real steps of train.py on this CPU."""

import dataclasses
import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import train
from clip import BUILT_IN, load_small
from common.cli import UserError
from layers import recomputed
from step import Learner
from tests.figures import LARGER, QUICK, Figures
from training import plan
from training.plan import FlopCounter, Rehearsal


def flop(call):
    with FlopCounter() as counter:
        call()
    return counter.total


def test_products_are_counted_as_their_formulas():
    """Grouped convolutions with a kernel for each sample: the forward pass and each of the two gradients take
    2 · B · D · C · k² · H · W. Fused attention: two products of 2 · B · heads · N² · d, and five in the backward pass,
    which computes the map again. Two recomputed layers: the first counts four times, the second three times.
    """
    batch = 5
    x, kernels = (torch.randn(*s, requires_grad=True) for s in ((1, batch * 6, 8, 8), (batch * 4, 6, 3, 3)))
    once = 2 * batch * 4 * 6 * 9 * 8 * 8
    assert flop(lambda: F.conv2d(x, kernels, padding=1, groups=batch)) == once
    assert flop(lambda: F.conv2d(x, kernels, padding=1, groups=batch).sum().backward()) == 3 * once
    assert flop(lambda: F.conv2d(x.detach(), kernels, padding=1, groups=batch).sum().backward()) == 2 * once
    q, k, v = torch.randn(3, batch, 2, 7, 16, requires_grad=True)
    product = 2 * batch * 2 * 7 * 7 * 16
    assert flop(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
    assert flop(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == (2 + 5) * product
    x, first, second = (torch.randn(*shape, requires_grad=True) for shape in ((batch, 3), (4, 3), (5, 4)))
    layers = recomputed(lambda x: F.linear(F.linear(x, first).relu(), second), x)
    once = 2 * batch * 3 * 4, 2 * batch * 4 * 5
    assert flop(lambda: layers.sum().backward()) + sum(once) == 4 * once[0] + 3 * once[1]


def batch_of(learner, size):
    batch = plan.empty_batch(learner, size)
    real = {r: torch.rand_like(x) for r, x in batch.real.items()}
    return batch._replace(real=real, z=torch.randn_like(batch.z), chances=torch.rand_like(batch.chances))


def peak_memory(function):
    """The peak bytes of PyTorch's CPU allocator during a call, minus those before."""
    gc.collect()  # otherwise older garbage may be freed during the call
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


def test_the_counts_are_those_of_a_step():
    """FLOP, except what grows with the square of the batch; memory to 10 %. The profiler counts what a step allocates;
    before the step, the state exists except the gradients.
    """
    lowest, images = dataclasses.replace(QUICK, recipe=dataclasses.replace(QUICK.recipe, recompute=True)), 6
    clip = load_small(BUILT_IN["emoji"])  # without folded batch norms, as in the plan
    learner = Learner(lowest, clip, torch.device("cpu"), torch.float32, 8)
    learner.step(0, [batch_of(learner, 2)])  # makes Adam's averages and gradients
    torch.backends.mha.set_fastpath_enabled(False)
    rehearsal = Rehearsal(lowest, "emoji", torch.float32)
    states = [state for o in (learner.optimizer_g, learner.optimizer_d) for state in o.state.values()]
    tensors = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    for network in (learner.generator, learner.discriminator, learner.ema, learner.clip):
        tensors += network.parameters()
    kept = sum(x.numel() * x.element_size() for x in tensors)
    captions = learner.clip.tokenize(["a red heart"] * images)
    assert flop(lambda: plan.empty_batch(learner, images)) == flop(lambda: learner.clip.encode_text(captions))
    batch = batch_of(learner, images)
    for kind, call in (
        ("step", lambda: learner.step(1, [batch_of(learner, images)])),
        ("r1", lambda: learner.penalize([batch], 16)),
    ):
        # CLIP's loss compares all pairs.
        assert rehearsal.of(kind, images)["float32"] == pytest.approx(flop(call), rel=1e-5)
        for optimizer in (learner.optimizer_g, learner.optimizer_d):
            optimizer.zero_grad(set_to_none=True)
        assert rehearsal.of(kind, images)["memory"] == pytest.approx(kept + peak_memory(call), rel=0.1)
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture
def rehearsed():
    """20 GB and 2 GB an image (R1: 3); 1 TFLOP an image (R1: 3 in float32, drawing 0.5)."""
    made = Rehearsal.__new__(Rehearsal)
    nothing = {"memory": 0, "moved": 0, "bfloat16": 0, "float32": 0}
    made.counts = [
        {
            "step": nothing | {"memory": 20e9 + 2e9 * n, "bfloat16": 1e12 * n},
            "r1": nothing | {"memory": 20e9 + 3e9 * n, "float32": 3e12 * n, "moved": 16e9 * n},
            "drawing": nothing | {"bfloat16": 0.5e12 * n},
        }
        for n in plan.REHEARSED
    ]
    return made


def test_micro_batches_are_the_fewest_that_fit(rehearsed):
    """Of 80 GB, 20 are used and 10 reserved; the rest has room for 16 images."""
    assert [rehearsed.fewest_micro_batches(share) for share in (4, 16, 24, 34, 64)] == [1, 1, 2, 17, 4]
    assert rehearsed.memory(16) == 68e9
    rehearsed.counts[0]["r1"]["memory"] += 100e9
    with pytest.raises(UserError, match="which does not fit; take a smaller preset"):
        rehearsed.fewest_micro_batches(4)


def test_the_table_has_a_row_for_each_number_of_gpus(rehearsed, monkeypatch, capsys):
    """192 images: 12 micro-batches on one GPU; on each of 8 two, which are drawn twice. R1 is in one step of 16."""
    monkeypatch.setattr(plan, "Rehearsal", lambda *options: rehearsed)
    monkeypatch.setattr(plan, "count_as_on_gpu", lambda: None)
    plan.print_plan(train.parse_args(["--plan", "--batch", "192", "--steps", "86400"]), QUICK)
    rows = [[float(x) for x in line.split()] for line in capsys.readouterr().out.splitlines()[3:6]]
    assert [row[:4] for row in rows] == [[1, 12, 16, 68], [8, 2, 12, 56], [64, 1, 3, 29]]
    for row, bf16, fp32, moved in ((rows[1], 24 + 12, 24 * 3 / 16, 0.024), (rows[2], 3, 3 * 3 / 16, 0.003)):
        seconds = (bf16 / 312 + fp32 / 19.5 + moved / 2.04) / 0.4
        assert row[4:] == pytest.approx([bf16, fp32, moved, seconds, seconds], rel=0.01)


@pytest.mark.parametrize("spec", ["nonsense", "ViT-B-16-SigLIP:webli"])
def test_a_clip_that_cannot_be_planned_is_refused(spec):
    with pytest.raises(UserError, match="needs emoji or a CLIP of open_clip"):
        plan.clip_without_weights(spec)


def test_a_preset_with_crops_is_planned_by_its_crops():
    """A planned batch has the shapes of a prepared one: a crop has half the sides."""
    clip = load_small(BUILT_IN["emoji"])
    learner = Learner(LARGER, clip, torch.device("cpu"), torch.float32, 4)
    (prepared,) = learner.prepare(0, 0, [next(Figures(32).batches(range(9), 4, 0, 1))])
    shapes = [[x.shape for x in tree_leaves(batch)] for batch in (plan.empty_batch(learner, 4), prepared)]
    assert shapes[0] == shapes[1] and prepared.real[32].shape == (4, 3, 16, 16)
