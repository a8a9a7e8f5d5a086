"""The figures of --plan against real steps of train.py on this CPU."""

import dataclasses

import pytest
import torch

import attention
from clip import load_clip
from common.cli import UserError
from data import sources
from presets import PRESETS
from tests.test_attention import peak_memory
from training import plan
from training.step import Learner

BATCH = 8


VARIANTS = {  # dtype, parts, gradient checkpointing
    "plain": (torch.float32, 1, False),
    "accumulated": (torch.float32, 2, False),
    "bfloat16": (torch.bfloat16, 1, False),
    "recomputed": (torch.float32, 1, True),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """A preset, the dtype of its products, and the number of parts."""
    dtype, parts, recompute = VARIANTS[request.param]
    shapes = PRESETS["shapes"]
    recipe = dataclasses.replace(shapes.recipe, recompute=recompute)
    return dataclasses.replace(shapes, recipe=recipe), dtype, parts


@pytest.fixture(scope="module")
def real(variant):
    """A learner at its highest resolution, and its step."""
    preset, dtype, parts = variant
    learner = Learner(preset, load_clip("small"), torch.device("cpu"), dtype, BATCH)
    batches = sources.loader(sources.open_data("shapes", 32, seed=0), 0, BATCH // parts, 0)
    made = learner.prepare(0, 0, [next(batches) for _ in range(parts)])
    learner.step(1, made)  # makes Adam's averages, and gradients
    return learner, lambda number: learner.step(number, made)


@pytest.fixture(scope="module")
def planned(variant):
    preset, dtype, parts = variant
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attention.BLOCK, "cuda", attention.BLOCK["cpu"])  # the step to compare with runs on a CPU
        return plan.rehearse(preset, "small", BATCH, dtype, parts)


def test_parameters_are_those_of_the_networks(real, planned):
    learner, _ = real
    sizes = {"generator": learner.generator, "discriminator": learner.discriminator}
    assert all(planned.parameters[name] == sum(p.numel() for p in x.parameters()) for name, x in sizes.items())
    gradients = [p.grad for x in sizes.values() for p in x.parameters() if p.grad is not None]
    assert planned.trained == sum(g.numel() for g in gradients)


def test_state_is_what_a_run_holds(real, planned):
    learner, _ = real
    networks = [*learner.generator.parameters(), *learner.discriminator.parameters()]
    averages = [
        state[name] for o in (learner.optimizer_g, learner.optimizer_d) for state in o.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    ]  # fmt: skip
    held = {
        "networks": networks,
        "gradients": [p.grad for p in networks if p.grad is not None],
        "Adam": averages,
        "moving average": [*learner.ema.parameters()],
        "CLIP": [*learner.clip.state_dict().values()],
    }
    for name, tensors in held.items():
        # The CLIP of a run has its batch norms folded.
        assert planned.state[name] == pytest.approx(
            sum(t.numel() * t.element_size() for t in tensors), rel=0.02 if name == "CLIP" else 0
        )


@pytest.mark.parametrize(("number", "kind"), [(1, "flop"), (0, "flop_with_r1")], ids=["plain", "with R1"])
def test_flop_are_those_of_a_step(real, planned, number, kind):
    _, step = real
    with plan.FlopCounter() as counter:
        step(number)
    assert getattr(planned, kind) == counter.by_dtype


@pytest.mark.parametrize(("number", "kind"), [(1, "peak"), (0, "peak_with_r1")], ids=["plain", "with R1"])
def test_memory_is_that_of_a_step(real, planned, number, kind):
    """To 10 %. The profiler sees what a step allocates; what it allocated before is the state but for the gradients."""
    _, step = real
    kept = sum(planned.state.values()) - planned.state["gradients"]
    assert getattr(planned, kind) == pytest.approx(kept + peak_memory(lambda: step(number)), rel=0.1)


def test_parts_are_the_fewest_that_fit():
    step = plan.Estimate(None, fixed=20e9, an_image=2e9, flop={}, flop_accumulated={})
    assert step.parts(20, 80e9) == 1  # 20 + 20 · 2 and 10 to spare are 70
    assert step.parts(32, 80e9) == 2 and step.parts(32, 38e9) == 8
    with pytest.raises(UserError, match="does not fit"):
        step.parts(32, 30e9)


def test_lines_for_people(monkeypatch, planned):
    quick = dataclasses.replace(PRESETS["shapes"], recipe=dataclasses.replace(PRESETS["shapes"].recipe, steps=1000))
    step = plan.Estimate(planned, 20e9, 1e9, {torch.bfloat16: 1e12}, {torch.bfloat16: 1.3e12})
    monkeypatch.setattr(plan, "estimate", lambda *_, resolution: dataclasses.replace(step, an_image=resolution / 32e-9))
    lines = list(plan.plan("quick", quick, "small", 256, 16, plan.HARDWARE["a100"], workers=1))
    rows = [line.split() for line in lines if line.startswith("   ") and line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["1", "8", "16", "64"]
    assert [row[1] for row in rows] == ["8", "1", "1", "1"]  # 20 + 50 GB at most, so up to 50 images in a part
    wire, memory = plan.HARDWARE["a100"], [float(row[2]) for row in rows]
    assert memory == [52, 52, 36, 24] and float(rows[0][4]) == 0 < float(rows[1][4])
    assert float(rows[3][5]) > float(rows[1][5]) * wire.within_node / wire.between_nodes
    assert float(rows[0][3]) == pytest.approx(256 * 1.3e12 / (312e12 * 0.25), rel=0.01)  # accumulated: drawn twice
    while_growing = next(line for line in lines if "while growing, 1 GPUs" in line)
    assert "4×4 24, 8×8 28, 16×16 36, 32×32 52" in while_growing
    with pytest.raises(UserError, match="does not fit"):
        list(plan.plan("quick", quick, "small", 256, 16, dataclasses.replace(wire, memory=1e6), workers=1))
