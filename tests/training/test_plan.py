"""The figures of --plan against real steps of train.py on this CPU."""

import dataclasses

import pytest
import torch

import train
from data import sources
from presets import PRESETS
from tests.test_attention import peak_memory
from training import plan

BATCH = 8


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A run at its highest resolution, and what of its state is there before a step."""
    out = tmp_path_factory.mktemp("run")
    arguments = f"--preset shapes --dtype fp32 --batch {BATCH} --workers 0 --out {out}".split()
    run = train.Run(train.parse_args(arguments), torch.device("cpu"))
    run.learner.learn_at(run.learner.resolutions)
    batch = next(sources.loader(run.source, 0, BATCH, 0))

    def step(number):
        run.step(number, [batch])

    step(1)  # makes Adam's averages, and gradients
    return run.learner, step


@pytest.fixture(scope="module")
def planned():
    return plan.rehearse(PRESETS["shapes"], "small", BATCH, torch.float32)


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
    assert getattr(planned, kind) == counter.total


@pytest.mark.parametrize(("number", "kind"), [(1, "peak"), (0, "peak_with_r1")], ids=["plain", "with R1"])
def test_memory_is_that_of_a_step(real, planned, number, kind):
    """To 10 %. The profiler sees what a step allocates; what it allocated before is the state but for the gradients."""
    _, step = real
    kept = sum(planned.state.values()) - planned.state["gradients"]
    assert getattr(planned, kind) == pytest.approx(kept + peak_memory(lambda: step(number)), rel=0.1)


def test_lines_for_people(monkeypatch):
    quick = dataclasses.replace(PRESETS["shapes"].recipe, steps=1000)
    monkeypatch.setitem(PRESETS, "quick", dataclasses.replace(PRESETS["shapes"], recipe=quick))
    lines = list(plan.plan("quick", "small", 256, 16, plan.HARDWARE["a100"], workers=1))
    rows = [line.split() for line in lines if line.startswith("   ") and line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["1", "8", "16", "64"]
    wire, memory = plan.HARDWARE["a100"], [float(row[2]) for row in rows]
    assert memory == sorted(memory, reverse=True) and float(rows[0][4]) == 0 < float(rows[1][4])
    assert float(rows[3][5]) > float(rows[1][5]) * wire.within_node / wire.between_nodes
    small = dataclasses.replace(plan.HARDWARE["a100"], memory=1e6)
    assert "does not fit" in list(plan.plan("quick", "small", 256, 16, small, workers=1))[-1]
