"""The figures of --plan against real steps of train.py on this CPU."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import attention
import train
from clip import BUILT_IN, load_small
from common.cli import UserError
from data import sources
from presets import PRESETS
from step import Learner
from tests.figures import TINY, Figures
from tests.test_attention import peak_memory
from training import plan

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
    recipe = dataclasses.replace(TINY.recipe, recompute=recompute)
    return dataclasses.replace(TINY, recipe=recipe), dtype, parts


@pytest.fixture(scope="module")
def real(variant):
    """A learner at its highest resolution, and its step."""
    preset, dtype, parts = variant
    clip = load_small(BUILT_IN["emoji"])  # its batch norms not folded, as in the plan, where nothing can be
    learner = Learner(preset, clip, torch.device("cpu"), dtype, BATCH)
    batches = sources.loader(Figures(32), 0, BATCH // parts, 0)
    made = learner.prepare(0, 0, [next(batches) for _ in range(parts)])
    learner.step(1, made)  # makes Adam's averages, and gradients
    return learner, lambda number: learner.step(number, made)


@pytest.fixture(scope="module")
def planned(variant):
    preset, dtype, parts = variant
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "fused_l2_attention", None)  # which the real step has no GPU for
        return plan.rehearse(preset, "emoji", BATCH, dtype, parts)


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
        assert planned.state[name] == sum(t.numel() * t.element_size() for t in tensors), name


@pytest.mark.parametrize(("number", "kind"), [(1, "flop"), (0, "flop_with_r1")], ids=["plain", "with R1"])
def test_flop_are_those_of_a_step(real, planned, number, kind):
    _, step = real
    with plan.FlopCounter() as counter:
        step(number)
    assert getattr(planned, kind) == counter.by_dtype


@pytest.mark.parametrize(("number", "kind"), [(1, "peak"), (0, "peak_with_r1")], ids=["plain", "with R1"])
def test_memory_is_that_of_a_step(variant, real, planned, number, kind):
    """To 10 %, in one part: the plan takes no figure of memory from a rehearsal in several. The profiler sees what a
    step allocates; what it allocated before is the state but for the gradients.
    """
    if variant[2] > 1:
        pytest.skip("the plan takes from it the work alone")
    _, step = real
    kept = sum(planned.state.values()) - planned.state["gradients"]
    assert getattr(planned, kind) == pytest.approx(kept + peak_memory(lambda: step(number)), rel=0.1)


def test_in_bfloat16_attention_is_planned_as_on_a_gpu(monkeypatch):
    """There a Triton kernel makes no map. A rehearsal that comes to it is stopped, as the rest would take seconds."""

    class Reached(Exception):
        pass

    def kernel(q, k, v):
        raise Reached

    monkeypatch.setattr(attention, "fused_l2_attention", kernel)
    with pytest.raises(Reached):
        plan.rehearse(PRESETS["emoji"], "emoji", 2, torch.bfloat16)


def test_parts_are_the_fewest_that_fit():
    memory = plan.Memory(fixed=20e9, an_image=2e9)
    assert memory.parts(20, 80e9) == 1  # 20 + 20 · 2 and 10 to spare are 70
    assert memory.parts(32, 80e9) == 2 and memory.parts(32, 38e9) == 8
    with pytest.raises(UserError, match="does not fit"):
        memory.parts(32, 30e9)


def test_what_fits_is_chosen_and_what_does_not_is_refused(monkeypatch, capsys):
    """By the plan at the highest resolution: of 80 GB, 20 and 10 to spare leave room for 25 images of 2 GB."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80e9))
    monkeypatch.setattr(plan, "estimate", lambda *_: (plan.Memory(fixed=20e9, an_image=2e9), None))
    run = TINY, 64, "emoji", torch.device("cuda", 0), torch.bfloat16
    assert plan.choose_parts(train.parse_args([]).accumulate, *run) == 4
    assert "--accumulate 4: parts of 16 images a GPU" in capsys.readouterr().out
    assert plan.choose_parts(8, *run) == 8
    with pytest.raises(UserError, match="--accumulate 2 does not fit into this GPU; take 4, or auto"):
        plan.choose_parts(2, *run)
    monkeypatch.setattr(plan.distributed, "world_size", lambda: 128)
    with pytest.raises(UserError, match="--batch 64 cannot be shared by 128 ranks"):
        plan.choose_parts("auto", *run)


def test_work_is_counted_and_timed_by_its_dtype():
    with plan.FlopCounter() as counter:
        for dtype, columns in ((torch.float32, 5), (torch.bfloat16, 7)):
            torch.ones(2, 3, dtype=dtype) @ torch.ones(3, columns, dtype=dtype)
    assert counter.by_dtype == {torch.float32: 2 * 2 * 3 * 5, torch.bfloat16: 2 * 2 * 3 * 7}
    for name, rates in (("a100", (312e12, 19.5e12)), ("h100", (989e12, 67e12))):
        narrow, wide = (rate * plan.UTILIZATION[t] for rate, t in zip(rates, plan.UTILIZATION, strict=True))
        seconds = plan.HARDWARE[name].seconds({torch.bfloat16: 6e12, torch.float32: 3e12})
        assert seconds == pytest.approx(6e12 / narrow + 3e12 / wide)


def test_lines_for_people(monkeypatch, planned):
    quick = dataclasses.replace(TINY, recipe=dataclasses.replace(TINY.recipe, steps=1000))
    work = dataclasses.replace(planned, flop={torch.bfloat16: 4e12}, flop_with_r1={torch.bfloat16: 4e12})
    drawn_twice = dataclasses.replace(planned, flop={torch.bfloat16: 5e12}, flop_with_r1={torch.bfloat16: 5e12})
    monkeypatch.setattr(plan, "rehearse", lambda *_, **__: drawn_twice)
    monkeypatch.setattr(plan, "estimate", lambda *_, resolution=32: (plan.Memory(20e9, resolution / 32 * 1e9), work))
    lines = list(plan.plan("quick", quick, "emoji", 256, 16, plan.HARDWARE["a100"], workers=1))
    rows = [line.split() for line in lines if line.startswith("   ") and line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["1", "8", "16", "64"]
    assert [row[1] for row in rows] == ["8", "1", "1", "1"]  # 20 + 50 GB at most, so up to 50 images in a part
    hardware, memory = plan.HARDWARE["a100"], [float(row[2]) for row in rows]
    assert memory == [52, 52, 36, 24] and float(rows[0][4]) == 0 < float(rows[1][4])
    assert float(rows[3][5]) > float(rows[1][5]) * hardware.within_node / hardware.between_nodes
    rate = 312e12 * 0.1
    assert float(rows[0][3]) == pytest.approx(256 * 1.25e12 / rate, rel=0.01)
    assert float(rows[1][3]) == pytest.approx(32 * 1e12 / rate, rel=0.01)
    while_growing = next(line for line in lines if "while growing, 1 GPUs" in line)
    assert "4×4 24, 8×8 28, 16×16 36, 32×32 52" in while_growing
    with pytest.raises(UserError, match="does not fit"):
        list(plan.plan("quick", quick, "emoji", 256, 16, dataclasses.replace(hardware, memory=1e6), workers=1))
    with pytest.raises(UserError, match="--batch 256 cannot be shared by --gpus 48"):
        list(plan.plan("quick", quick, "emoji", 256, 48, hardware, workers=1))
