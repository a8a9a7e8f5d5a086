"""The plan's counts compared with formulas, and with real steps of train.py on this CPU."""

import dataclasses
import gc
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import attention
import train
from clip import BUILT_IN, load_small
from common.cli import UserError
from layers import recomputed
from presets import PRESETS
from step import Learner
from tests.figures import QUICK
from tests.test_attention import peak_memory
from training import plan
from training.plan import FlopCounter, Rehearsal


def flop(call):
    with FlopCounter() as counter:
        call()
    return counter.total


@pytest.mark.parametrize("batch", [2, 5])
def test_products_are_counted_as_their_formulas(batch):
    """Grouped convolutions with a kernel for each sample: the forward pass and each of the two gradients take
    2 · B · D · C · k² · H · W. Fused attention: two products of 2 · B · heads · N² · d, and five in the backward pass,
    which computes the map again. Two recomputed layers: the first counts four times, the second three times.
    """
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


# ----------------------------------------------------------------------------------------------------------------------
# Against real steps.


LOWEST = dataclasses.replace(QUICK, recipe=dataclasses.replace(QUICK.recipe, recompute=True))


@pytest.fixture(scope="module")
def both():
    """A rehearsal, and a real learner."""
    clip = load_small(BUILT_IN["emoji"])  # without folded batch norms, as in the plan
    rehearsal = Rehearsal(LOWEST, "emoji", torch.float32)
    learner = Learner(LOWEST, clip, torch.device("cpu"), torch.float32, 8)
    learner.step(0, [batch_of(learner, 2)])  # makes Adam's averages and gradients
    return rehearsal, learner


def batch_of(learner, size):
    batch = plan.empty_batch(learner, size)
    real = {r: torch.rand_like(x) for r, x in batch.real.items()}
    return batch._replace(real=real, z=torch.randn_like(batch.z), chances=torch.rand_like(batch.chances))


def test_parameters_and_state_are_those_of_a_run(both):
    rehearsal, learner = both
    networks = [*learner.generator.parameters(), *learner.discriminator.parameters()]
    states = [state for o in (learner.optimizer_g, learner.optimizer_d) for state in o.state.values()]
    held = {
        "networks": networks,
        "gradients at most": [p.grad for p in networks if p.grad is not None],
        "Adam": [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")],
        "moving average": [*learner.ema.parameters()],
        "CLIP": [*learner.clip.parameters()],
    }
    for name, tensors in held.items():
        assert rehearsal.kept[name] == sum(t.numel() * t.element_size() for t in tensors), name


@pytest.mark.parametrize("images", [4, 6])
def test_the_counts_are_those_of_a_step(both, images, monkeypatch):
    """FLOP, except what grows with the square of the batch; memory to 10 %. The profiler counts what a step allocates;
    before the step, the state exists except the gradients.
    """
    rehearsal, learner = both
    kept = sum(size for name, size in rehearsal.kept.items() if name != "gradients at most")
    captions = learner.clip.tokenize(["a red heart"] * images)
    assert flop(lambda: plan.empty_batch(learner, images)) == flop(lambda: learner.clip.encode_text(captions))
    fast = torch.backends.mha.get_fastpath_enabled()
    monkeypatch.setattr(learner, "r1_images", images)
    batch = batch_of(learner, images)
    for kind, call in (
        ("step", lambda: learner.step(1, [batch_of(learner, images)])),
        ("r1", lambda: learner.penalize([batch], 16)),
    ):
        torch.backends.mha.set_fastpath_enabled(False)
        found = flop(call)
        torch.backends.mha.set_fastpath_enabled(fast)
        assert rehearsal.of(kind, images)["float32"] == pytest.approx(found, rel=1e-5)  # CLIP's loss compares all pairs
        for optimizer in (learner.optimizer_g, learner.optimizer_d):
            optimizer.zero_grad(set_to_none=True)
        gc.collect()
        assert rehearsal.of(kind, images)["memory"] == pytest.approx(kept + peak_memory(call), rel=0.1)


def test_in_bfloat16_attention_is_planned_as_on_a_gpu(monkeypatch):
    """There a Triton kernel makes no map. The rehearsal ends at the kernel, because the rest would take seconds."""

    class Reached(Exception):
        pass

    def kernel(q, k, v):
        raise Reached

    monkeypatch.setattr(attention, "fused_l2_attention", kernel)
    with pytest.raises(Reached):
        Rehearsal(LOWEST, "emoji", torch.bfloat16)


# ----------------------------------------------------------------------------------------------------------------------
# From counts to a run.


@pytest.fixture
def rehearsed():
    """20 GB and 2 GB an image (R1: 6, evaluation: 1); 1 TFLOP an image (R1: 3 in float32, drawing .5, evaluation 2)."""
    made = Rehearsal.__new__(Rehearsal)
    nothing = {"memory": 0, "moved": 0, "bfloat16": 0, "float32": 0}
    made.counts = [
        {
            "step": nothing | {"memory": 20e9 + 2e9 * n, "bfloat16": 1e12 * n},
            "r1": nothing | {"memory": 20e9 + 6e9 * n, "float32": 3e12 * n, "moved": 16e9 * n},
            "drawing": nothing | {"bfloat16": 0.5e12 * n},
            "evaluation": nothing | {"memory": 20e9 + 1e9 * n, "bfloat16": 2e12 * n},
        }
        for n in plan.REHEARSED
    ]
    made.parameters, made.kept = {"generator": 1e9}, {"networks": 4e9}
    return made


def test_micro_batches_are_the_fewest_that_fit_and_r1_has_smaller_ones(rehearsed):
    """Of 80 GB, 20 are used and 10 reserved; the rest has room for 25 images, or for 8 of R1."""
    assert rehearsed.divide(24, 80e9) == (1, 8)
    assert rehearsed.divide(64, 80e9) == (4, 8) and rehearsed.divide(4, 80e9) == (1, 4)
    assert rehearsed.memory(24, 8) == 68e9 and rehearsed.memory(8, 8) == 68e9
    assert rehearsed.memory(1, 1) == 20e9 + plan.DRAWN * 1e9  # the evaluation's
    with pytest.raises(UserError, match="does not fit"):
        rehearsed.divide(32, 45e9)  # one image would fit, and an evaluation does not


def test_micro_batches_are_drawn_twice(rehearsed):
    one, several = rehearsed.work(32, 1), rehearsed.work(32, 4)
    assert one["bfloat16"] == 32e12 and several["bfloat16"] == pytest.approx(48e12)
    assert one["float32"] == several["float32"] == 32 * 3e12 / 16
    seconds = (32e12 / 312e12 + 6e12 / 19.5e12 + 32e9 / 2.04e12) / plan.SHARE_OF_PEAK
    assert plan.HARDWARE["a100"].seconds(one) == pytest.approx(seconds)


def test_the_choice_is_kept_and_what_does_not_fit_is_refused(rehearsed, monkeypatch, capsys, tmp_path):
    rehearsals = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80e9))
    monkeypatch.setattr(plan, "Rehearsal", lambda *options: rehearsals.append(options) or rehearsed)
    run = QUICK, 64, "emoji", torch.device("cuda", 0), torch.bfloat16, tmp_path / "run" / "plan.json"
    assert plan.choose_micro_batches(train.parse_args([]).accumulate, *run) == (4, 8)
    assert "--accumulate 4: micro-batches of 16 images a GPU, R1 of 8 at a time" in capsys.readouterr().out
    assert plan.choose_micro_batches(8, *run) == (8, 8) and len(rehearsals) == 1  # the run's folder has the plan
    with pytest.raises(UserError, match="--accumulate 2 does not fit into this GPU; take 4, or auto"):
        plan.choose_micro_batches(2, *run)
    plan.choose_micro_batches("auto", *run[:1], 32, *run[2:])
    assert len(rehearsals) == 2
    monkeypatch.setattr(plan.distributed, "world_size", lambda: 128)
    with pytest.raises(UserError, match="--batch 64 cannot be shared by 128 ranks"):
        plan.choose_micro_batches("auto", *run)


def test_the_table_has_a_row_for_each_number_of_gpus(rehearsed, monkeypatch, capsys):
    """192 images: 24 on each of 8 GPUs, or in 8 micro-batches on one."""
    monkeypatch.setattr(plan, "Rehearsal", lambda *options: rehearsed)
    args = train.parse_args(["--plan", "--batch", "192", "--steps", "86400"])
    plan.print_plan(args, QUICK)
    said = capsys.readouterr().out
    assert "its ideal time" in said and "Assumed" in said and "of the bfloat16 peak" in said
    rows = [line.split() for line in said.splitlines() if line.startswith("   ")]
    one, eight, all64 = (plan.HARDWARE["a100"].seconds(rehearsed.work(*x)) for x in ((192, 8), (24, 1), (3, 1)))
    expected = [(1, 8, 24, 8, 68, one), (8, 1, 24, 8, 68, eight), (64, 1, 3, 3, 38, all64)]
    evaluation = QUICK.recipe.fid_samples * 192 / QUICK.recipe.fid_every * 2e12 / 312e12 / plan.SHARE_OF_PEAK
    for row, (gpus, *numbers, seconds) in zip(rows[-3:], expected, strict=True):
        numbers, seconds = [gpus, *numbers], seconds + evaluation / gpus
        assert [float(x.replace(",", "")) for x in row] == pytest.approx([*numbers, seconds, seconds], rel=0.01)


def test_a_preset_with_crops_is_planned_by_its_crops():
    """Its steps multiply about a quarter of what whole pictures would: a crop has half the sides."""
    preset = PRESETS["emoji-256"]
    whole = dataclasses.replace(preset, recipe=dataclasses.replace(preset.recipe, crop=0))
    cropped, uncropped = (Rehearsal(each, "emoji", torch.float32).of("step", 8)["float32"] for each in (preset, whole))
    assert 0.2 < cropped / uncropped < 0.4
