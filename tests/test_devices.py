"""Training, sampling and evaluation on a fake CUDA device: they mix no devices, and a step never waits."""

import collections
import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException

import attention
from data.sources import Batch
from evaluation import extractors, features
from growth import Growth
from kernels import l2_attention
from presets import Preset, fitted_to
from sampling import inference, views
from sampling.pipeline import Pipeline, draw
from step import Learner
from tests.figures import LARGER, TINY
from training.loop import overfitting, watched_pairs
from training.plan import FlopCounter, clip_without_weights
from weights.efficientnet import load_efficientnet

pytest.importorskip("triton")
from tests.fake_cuda import DEVICE, fake_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
BATCH, SIDE, PROMPTS = 4, 8, ["a red circle", "two blue squares"]
# The batch comes from the CPU. Nothing else in a step does, and the host reads no result.
OF_A_BATCH = {"cpu to cuda, clip.py:tokenize", "cpu to cuda, step.py:<genexpr>"}


@pytest.fixture
def device():
    with fake_cuda() as device:
        yield device


def batch_of(size):
    captions = [PROMPTS[i % 2] for i in range(size)]
    return Batch(torch.empty(size, 3, SIDE, SIDE), captions, collections.Counter())


def learner_of(recompute=False):
    """A Learner of the two lowest resolutions of `tiny`: both deformable, the higher one with adaptive kernels."""
    with DEVICE:
        clip = clip_without_weights("emoji")
    preset, recipe = TINY, dataclasses.replace(TINY.recipe, recompute=recompute)
    lowest, higher = preset.generator.levels[:2]
    levels = lowest, dataclasses.replace(higher, num_kernels=2, deformable=True)
    generator = dataclasses.replace(preset.generator, levels=levels)
    discriminator = dataclasses.replace(preset.discriminator, levels=preset.discriminator.levels[:2])
    preset = fitted_to(Preset(generator, discriminator, recipe), clip.width, clip.map_shapes())
    return Learner(preset, clip, DEVICE, torch.bfloat16, BATCH)


def test_the_device_detects_mixing_and_waiting(device):
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    with pytest.raises(DynamicOutputShapeException):
        x.nonzero()
    for wait in (x.sum().item, x.any().__bool__, x.cpu, lambda: torch.tensor([0.0], device=DEVICE), lambda: x[[0]]):
        device.waits.clear()
        wait()
        assert len(device.waits) == 1


def step(device, learner, batches):
    """→ the report of a step that waits only for its batch."""
    device.waits.clear()
    report = learner.step(0, learner.prepare(0, 0, batches))
    assert {value.device for value in report.values()} == {DEVICE} and device.waits == OF_A_BATCH
    return report


@pytest.mark.parametrize(("parts", "recompute"), [(1, False), (2, True)], ids=["plain", "in parts, recomputed"])
def test_a_step_waits_for_its_batch_alone(device, parts, recompute):
    assert "r1" in step(device, learner_of(recompute), [batch_of(BATCH // parts)] * parts)


def test_a_step_of_the_second_stage_waits_for_its_batch_alone(device):
    with DEVICE:
        clip = clip_without_weights("emoji")
        perceptual = load_efficientnet(features_only=True, with_weights=False)
    learner = Learner(fitted_to(LARGER, clip.width, clip.map_shapes()), clip, DEVICE, torch.bfloat16, BATCH, perceptual)
    report = step(device, learner, [batch_of(BATCH)._replace(images=torch.empty(BATCH, 3, 32, 32))])
    assert {"r1", "g_l1", "g_perceptual"} < report.keys()


def test_kernels_of_attention_are_launched_where_their_tensors_are(device):
    """A step does not test it: for tensors without content, PyTorch replaces our operators by their fake versions."""
    q, k, v = torch.empty(3, 2, 5, 8, device=DEVICE)
    out, lse = l2_attention.forward(q, k, v)
    l2_attention.backward(q, k, v, out, lse, upstream=out)


def test_attention_is_fused_there(device):
    q = torch.empty(1, 2, 5, 8, device=DEVICE, dtype=torch.bfloat16)
    with FlopCounter() as counter:
        attention.l2_attention(q, q, q)
    assert counter.by_dtype == {torch.bfloat16: 2 * 2 * 2 * 5 * 5 * 8}  # a map computed in blocks is float32
    assert attention.l2_attention(*[q.double()] * 3).dtype == torch.float64


class Source:
    """A source of captioned images."""

    def evaluation(self, batch=BATCH, held_out=False, rank=0, world_size=1):
        yield from [batch_of(BATCH)] * 2

    evaluation_pairs = evaluation


def test_the_fid_of_training_and_overfitting(device):
    learner = learner_of()
    growth = Growth(dataclasses.replace(learner.recipe, fid_samples=BATCH), learner.resolutions, learner.clip, seed=0)
    kept = growth.compute_reference(Source())
    vars(growth).update({name: kept[name] for name in ("captions", "statistics", "reference_fid", "given")})
    assert "fid" in growth.evaluate(learner.ema)
    assert "overfitting" in overfitting(learner, watched_pairs(Source(), learner.clip), seed=0)


def test_every_view_of_sampling(device):
    learner = learner_of()
    generator, clip = inference.prepare(learner.ema), learner.clip
    with torch.no_grad():
        frames = [
            *views.samples(generator, clip, PROMPTS, 2, 0, 0.7),
            *views.seeds_by_prompts(generator, clip, PROMPTS, [0, 1], 0.7),
            *views.truncation_sweep(generator, clip, PROMPTS, 0),
            *views.interpolation(generator, clip, PROMPTS, 0, 0.7, 3, "both"),
            *views.latent_walk(generator, clip, PROMPTS[0], 0, 0.7, 4),
            *views.layer_mixing(Pipeline(generator, clip, {}), *PROMPTS, 0, 0.7),
        ]
    drawn = draw(generator, frames)
    assert drawn.images.shape == (len(frames), 3, SIDE, SIDE)
    assert {drawn.images.device, *(x.device for routing in drawn.routings.values() for x in routing)} == {DEVICE}


def test_what_evaluation_measures(device, monkeypatch):
    learner = learner_of()
    monkeypatch.setattr(extractors, "load_clip", lambda spec, device: learner.clip)
    reader = dict.fromkeys(("images", "texts"), extractors.small_clip("emoji", DEVICE))
    captions, real, _ = features.extract_real(Source(), BATCH, SIDE, reader)
    real = {name: x.to(DEVICE) for name, x in real.items()}
    draw = features.drawing(inference.prepare(learner.ema), learner.clip, SIDE)
    result = features.measure(draw, captions, real, BATCH, 0, SIDE, reader)
    assert {"R-precision", "FID"} <= result.keys()
