"""Every loss against its formula in float64. What ranks share is in training/test_distributed.py."""

import copy
import dataclasses
import math

import numpy as np
import open_clip
import pytest
import torch

import losses
from augment import NUM_CHANCES, augment
from aurora import Generator, Output
from clip import from_open_clip, load_clip
from common import distributed
from discriminator import CLIP, Discriminator
from presets import PRESETS
from router import Routing
from tests import figures
from tests.figures import TINY, moved


def softplus(x):
    return np.log1p(np.exp(x))


@pytest.mark.parametrize("early", [0.01, 0.05])
def test_logistic_loss_is_its_formula(early):
    logits = {
        (entered, stage): torch.randn(3, (stage // 2) ** 2, dtype=torch.float64)
        for entered in (4, 8, 16)
        for stage in (4, 8, 16)
        if stage <= entered
    }
    logits[16, CLIP] = torch.randn(3, 4, dtype=torch.float64)
    scale = {16: 0.6, 8: 0.3, 4: 0.1}
    expected = np.zeros(3)
    for (entered, stage), x in logits.items():
        expected += scale[entered] * (1 if stage in (4, CLIP) else early) * softplus(-x.numpy()).mean(1)
    np.testing.assert_allclose(losses.logistic_loss(logits, -1, early, scale), expected, rtol=1e-12)


def test_the_last_prediction_is_of_the_highest_image_after_the_last_stage():
    logits = {key: torch.randn(2, 1) for key in ((4, 4), (8, 4), (8, 8), (4, CLIP), (8, CLIP))}
    assert losses.last_prediction(logits) is logits[8, 4]


def test_scale_weights_are_the_papers():
    assert losses.scale_weights([4, 8, 16, 32, 64], PRESETS["aurora-64"].recipe.lower_scales) == pytest.approx(
        {64: 0.33 / 1.01, 32: 0.17 / 1.01, 16: 0.17 / 1.01, 8: 0.17 / 1.01, 4: 0.17 / 1.01}
    )
    assert losses.scale_weights([4], 0.02) == {4: 1.0}


def test_wrong_captions_are_the_next_that_differ():
    ids = torch.tensor([[1, 1], [1, 1], [2, 5], [1, 1], [2, 5], [3, 3]])
    assert losses.wrong_captions(ids).tolist() == [2, 2, 3, 4, 5, 0]
    assert losses.wrong_captions(torch.ones(4, 2, dtype=torch.long)).tolist() == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def clip():
    return load_clip("emoji")


@pytest.fixture
def tiny(discriminator_config):
    torch.manual_seed(0)
    return moved(Discriminator(discriminator_config).double())


def real(batch=2):
    return {r: torch.rand(batch, 3, r, r, dtype=torch.float64) * 2 - 1 for r in (4, 8)}


def test_r1_is_the_gradient_norm_of_each_image(tiny, clip):
    """By the definition: image by image, a gradient of that image's own predictions."""
    pyramid, tokens, eot = real(), torch.randn(2, 7, 12, dtype=torch.float64), torch.tensor([6, 3])
    expected, clip = 0.0, copy.deepcopy(clip).double()
    scales = {8: 0.7, 4: 0.3}
    for entered, scale in scales.items():
        for i in range(2):
            image = pyramid[entered][i : i + 1].clone().requires_grad_()
            one = {r: image if r == entered else x[i : i + 1] for r, x in pyramid.items()}
            logits = tiny(one, clip.see(one[8])[1], tokens[i : i + 1], eot[i : i + 1])
            score = sum((1 if s in (4, CLIP) else 0.01) * x.mean() for (e, s), x in logits.items() if e == entered)
            (gradient,) = torch.autograd.grad(score, image)
            expected += scale * 2.0 * (entered / 64) ** 2 / 2 * gradient.square().sum().item() / 2
    ours = losses.r1_penalty(tiny, clip, pyramid, tokens, eot, 2.0, scales).item()
    assert ours == pytest.approx(expected, rel=1e-9)


def vision_transformer():
    vision = dict(image_size=16, layers=4, width=16, head_width=8, patch_size=8)
    text = dict(context_length=7, vocab_size=9, width=12, heads=2, layers=1)
    return from_open_clip(open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text), "test")


@pytest.mark.parametrize("kind", ["convolutions", "vision transformer"])  # whose attention is fused elsewhere
def test_r1_passes_gradcheck(discriminator_config, clip, kind):
    """Its gradient, which needs second derivatives of the discriminator and of CLIP, against finite differences."""
    torch.manual_seed(0)
    clip = copy.deepcopy(clip if kind == "convolutions" else vision_transformer()).double()
    config = dataclasses.replace(discriminator_config, clip_maps=clip.map_shapes())
    tiny, pyramid, eot = moved(Discriminator(config).double()), real(), torch.tensor([6, 3])
    tokens = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    weights = [
        tiny.stages["8"].from_rgb.bias,
        tiny.stages["8"].body[0].to_v.weight,
        tiny.stages["4"].body[-1].conv.bias,
        tiny.heads["4"].last.weight,
        tiny.map_readers[0][0].conv.weight,
    ]

    def penalty(tokens, *_):
        return losses.r1_penalty(tiny, clip, pyramid, tokens, eot, 100.0, {8: 0.7, 4: 0.3})

    assert torch.autograd.gradcheck(penalty, (tokens, *weights), fast_mode=True, atol=1e-7)


def batch_of(count):
    return figures.images(range(count), 16), [figures.caption(i) for i in range(count)]


def test_clip_loss_is_symmetric_info_nce_at_every_resolution(clip):
    images, captions = batch_of(5)
    text = clip.read(captions)
    pyramid = {8: torch.nn.functional.interpolate(images, 8, mode="area"), 16: images}
    expected = []
    for image in pyramid.values():
        a = clip.encode_image(image).detach().double().numpy()
        b, s = text.embedding.double().numpy(), clip.logit_scale.item()
        logits = s * (a / np.linalg.norm(a, axis=1, keepdims=True)) @ b.T
        rows = [np.log(np.exp(row - row.max()).sum()) + row.max() - row[i] for i, row in enumerate(logits)]
        columns = [np.log(np.exp(col - col.max()).sum()) + col.max() - col[i] for i, col in enumerate(logits.T)]
        expected.append((np.mean(rows) + np.mean(columns)) / 2)
    expected = 0.2 * expected[0] + 0.8 * expected[1]
    embeddings = {r: clip.encode_image(image) for r, image in pyramid.items()}
    ours = losses.clip_loss(clip, embeddings, text.embedding, {8: 0.2, 16: 0.8}).item()
    assert ours == pytest.approx(expected, rel=1e-4)


def test_clip_loss_reaches_the_images_and_not_clip(clip):
    images, captions = batch_of(4)
    images.requires_grad_()
    text = clip.read(captions)
    losses.clip_loss(clip, {16: clip.encode_image(images)}, text.embedding, {16: 1.0}).backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters())


def test_the_losses_of_routers_are_their_formulas_and_are_added():
    """A thousandth of the z-loss, as in the release."""
    logits = torch.randn(3, 5, 4, dtype=torch.float64)
    index = torch.randint(4, (3, 5))
    z = sum(point.exp().sum().log() ** 2 for image in logits for point in image) / 15
    torch.testing.assert_close(losses.z_loss(logits), z)
    balance = 0.0
    for image, chosen in zip(logits, index, strict=True):
        for expert in range(4):
            share = sum(int(c) == expert for c in chosen) / 5
            probability = sum((point.exp() / point.exp().sum())[expert] for point in image) / 5
            balance += 4 * share * probability / 3
    torch.testing.assert_close(losses.load_balancing_loss(logits, index), balance)
    routings = dict.fromkeys(("8.0.0", "8.0.1"), Routing(logits, index, None))
    output = Output(image=None, pyramid={}, w=torch.zeros(3, 4).double(), routings=routings)
    torch.testing.assert_close(losses.moe_loss(output, 0.01), 2 * (0.001 * z + 0.01 * balance))


def test_a_loss_of_weight_zero_costs_no_pass_through_clip(monkeypatch):
    generator, discriminator, clip, _, _, captions, z = objectives()
    recipe = dataclasses.replace(TINY.recipe, adversarial_weight=0.0, clip_weight=0.0)
    text = clip.read(captions)
    output = generator(z, text.tokens, text.eot, 8)
    monkeypatch.setattr(clip, "see", lambda *_: pytest.fail("CLIP saw images"))
    losses.generator_loss(output, text, torch.arange(6), CHANCES[:, 1], discriminator, clip, recipe)


def test_wrong_captions_are_found_on_other_ranks_and_own_ones_count_nothing(monkeypatch):
    """The second of two ranks, of which the last caption has no other to be wrong."""
    codes = torch.randn(4, 3)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "gather", lambda _: codes)
    code, is_wrong = losses.wrong_codes(codes[2:], torch.tensor([0, 3]))
    assert torch.equal(code, codes[[0, 3]]) and is_wrong.tolist() == [1, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Both objectives as training computes them.


def objectives():
    """Networks of the preset `tiny` up to 8×8, and a batch of six with one caption twice."""
    torch.manual_seed(0)
    generator, discriminator = Generator(TINY.generator), Discriminator(TINY.discriminator)
    for network in (generator, discriminator):
        moved(network, by=0.05)
    for level in generator.synthesis.levels:
        level.requires_grad_(level.resolution <= 8)
    for modules in (discriminator.stages, discriminator.heads):
        for resolution, module in modules.items():
            module.requires_grad_(resolution in ("4", "8", CLIP))
    images, captions = batch_of(6)
    captions[1] = captions[0]
    clip = load_clip("emoji")
    real = {r: torch.nn.functional.interpolate(images, r, mode="area") for r in (4, 8)}
    fake = {r: torch.randn(6, 3, r, r) * 0.3 for r in (4, 8)}
    return generator, discriminator, clip, real, fake, captions, torch.randn(6, TINY.generator.z_dim)


CHANCES = torch.rand(6, 2, NUM_CHANCES, generator=torch.Generator().manual_seed(0))


def test_both_objectives_are_the_sum_of_their_parts():
    generator, discriminator, clip, real, fake, captions, z = objectives()
    recipe = dataclasses.replace(TINY.recipe, balance_weight=1.0, adversarial_weight=0.7)
    ids = clip.tokenize(captions)
    text, wrong = clip.encode_text(ids), losses.wrong_captions(ids)
    report = losses.DiscriminatorLoss(discriminator, clip, recipe)(real, fake, text, wrong, CHANCES)
    logits, mismatched = {}, {}
    for kind, x in (("real", real), ("fake", fake)):
        maps = clip.see(x[8])[1]
        logits[kind] = discriminator(x, maps, text.tokens, text.eot)
        mismatched[kind] = discriminator(x, maps, text.tokens[wrong], text.eot[wrong])
    weight = {8: 1 / (1 + recipe.lower_scales), 4: recipe.lower_scales / (1 + recipe.lower_scales)}

    def total(logits, sign, early):
        terms = [
            weight[e] * (1 if s in (4, CLIP) else early) * softplus(sign * x.detach().double().numpy()).mean()
            for (e, s), x in logits.items()
        ]
        return sum(terms)

    adversarial = total(logits["real"], -1, 0.01) + total(logits["fake"], 1, 0.01)
    matching = total(mismatched["real"], 1, 0.05) + total(mismatched["fake"], 1, 0.05)
    expected = adversarial + recipe.matching_weight_discriminator * matching
    assert report["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert report["d_matching"].item() == pytest.approx(matching, rel=1e-4)

    output = generator(z, text.tokens, text.eot, 8)
    report = losses.generator_loss(output, text, wrong, CHANCES[:, 1], discriminator, clip, recipe)
    maps = clip.see(output.image)[1]
    adversarial = total(discriminator(output.pyramid, maps, text.tokens, text.eot), -1, 0.01)
    matching = total(discriminator(output.pyramid, maps, text.tokens[wrong], text.eot[wrong]), -1, 0.05)
    embeddings = {r: clip.encode_image(x) for r, x in output.pyramid.items()}
    alignment = losses.clip_loss(clip, embeddings, text.embedding, weight).item()
    assert report["g_clip"].item() == pytest.approx(alignment, rel=1e-6)  # of each resolution by its own weight
    expected = 0.7 * (adversarial + recipe.matching_weight_generator * matching) + recipe.clip_weight * alignment
    assert report["loss"].item() == pytest.approx(expected + losses.moe_loss(output, 1.0).item(), rel=1e-4)
    assert math.isfinite(report["loss"].item())


@pytest.mark.parametrize("every", (1, 2, 3, 6))
def test_clip_sees_every_nth_of_the_lower_images(every):
    generator, discriminator, clip, _, _, captions, z = objectives()
    recipe = dataclasses.replace(TINY.recipe, lower_scales=0.5, clip_lower_every=every, adversarial_weight=0.0)
    text = clip.read(captions)
    output = generator(z, text.tokens, text.eot, 8)
    options = text, torch.arange(6), CHANCES[:, 1], discriminator, clip, recipe
    report = losses.generator_loss(output, *options)
    high = losses.clip_loss(clip, {8: clip.encode_image(output.image)}, text.embedding, {8: 2 / 3})
    lower = {4: clip.encode_image(output.pyramid[4][::every])}
    expected = high + losses.clip_loss(clip, lower, text.embedding[::every], {4: 1 / 3})
    assert report["g_clip"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_clip_sees_the_small_images_and_the_largest(monkeypatch):
    """At 128×128 and 256×256 an image looks alike to it; the largest is always shown."""
    clip, shown = load_clip("emoji"), []
    see = clip.see
    monkeypatch.setattr(clip, "see", lambda *images: [shown.append(x.shape[-1]) for x in images] and see(*images))
    pyramid = {r: torch.zeros(2, 3, r, r) for r in (32, 64, 128, 256)}
    output = Output(image=pyramid[256], pyramid=pyramid, w=torch.zeros(2, 4), routings={})
    recipe = dataclasses.replace(TINY.recipe, adversarial_weight=0.0)
    text = clip.read(["a", "b"])
    losses.generator_loss(output, text, torch.tensor([1, 0]), CHANCES[:2, 1], None, clip, recipe)
    assert shown == [32, 64, 256]


def test_without_a_wrong_caption_nothing_is_matched():
    generator, discriminator, clip, real, fake, captions, z = objectives()
    recipe, ids = TINY.recipe, clip.tokenize(captions[:1] * 6)
    text, wrong = clip.encode_text(ids), losses.wrong_captions(ids)
    report = losses.DiscriminatorLoss(discriminator, clip, recipe)(real, fake, text, wrong, CHANCES)
    output = generator(z, text.tokens, text.eot, 8)
    of_generator = losses.generator_loss(output, text, wrong, CHANCES[:, 1], discriminator, clip, recipe)
    assert report["d_matching"] == of_generator["g_matching"] == 0


def test_the_discriminator_sees_augmented_images_and_clip_those_as_they_are():
    """Real and generated ones by chances of their own: as if they had been changed before."""
    generator, discriminator, clip, real, fake, captions, z = objectives()
    plain, ids = TINY.recipe, clip.tokenize(captions)
    augmented = dataclasses.replace(plain, augment=("color", "cutout"))
    text, wrong = clip.encode_text(ids), losses.wrong_captions(ids)
    changed = [augment(x, augmented.augment, CHANCES[:, n]) for n, x in enumerate((real, fake))]
    report = losses.DiscriminatorLoss(discriminator, clip, augmented)(real, fake, text, wrong, CHANCES)
    expected = losses.DiscriminatorLoss(discriminator, clip, plain)(*changed, text, wrong, CHANCES)
    assert all(report[name].item() == pytest.approx(value.item(), rel=1e-5) for name, value in expected.items())

    output = generator(z, text.tokens, text.eot, 8)
    common = text, wrong, CHANCES[:, 1], discriminator, clip
    report, without = (losses.generator_loss(output, *common, recipe) for recipe in (augmented, plain))
    changed = augment(output.pyramid, augmented.augment, CHANCES[:, 1])
    expected = losses.generator_loss(dataclasses.replace(output, pyramid=changed), *common, plain)
    for name, source in (("g_adversarial", expected), ("g_matching", expected), ("g_clip", without)):
        assert report[name].item() == pytest.approx(source[name].item(), rel=1e-5), name


def test_bfloat16_is_safe():
    """Under autocast both objectives stay near their float32 values, and every gradient is finite."""
    generator, discriminator, clip, real, fake, captions, z = objectives()
    recipe = TINY.recipe
    ids = clip.tokenize(captions)
    text, wrong = clip.encode_text(ids), losses.wrong_captions(ids)

    def both():
        d_report = losses.DiscriminatorLoss(discriminator, clip, recipe)(real, fake, text, wrong, CHANCES)
        scales = losses.scale_weights(real, recipe.lower_scales)
        r1 = losses.r1_penalty(discriminator, clip, real, text.tokens, text.eot, recipe.r1_gamma, scales)
        d_report |= {"r1": r1, "loss": d_report["loss"] + r1}
        output = generator(z, text.tokens, text.eot, 8)
        g_report = losses.generator_loss(output, text, wrong, CHANCES[:, 1], discriminator, clip, recipe)
        return d_report, g_report

    exact, clip_sees_in = both(), []
    note = clip.visual.conv1.register_forward_hook(lambda _, inputs, output: clip_sees_in.append(output.dtype))
    with note, torch.autocast("cpu", torch.bfloat16):
        rounded = both()
    assert clip_sees_in == [torch.bfloat16, torch.float32, torch.bfloat16]  # for D, for R1, for G
    for a, b in zip(exact, rounded, strict=True):
        for name in a:
            assert b[name].item() == pytest.approx(a[name].item(), rel=0.05), name
    assert rounded[0]["r1"].item() == pytest.approx(exact[0]["r1"].item(), rel=1e-6)  # in float32 throughout
    sum(report["loss"] for report in rounded).backward()
    for module in (generator, discriminator):
        assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def test_the_perceptual_distance_is_that_between_directions_of_features():
    """2 − 2·cosine at each point."""
    maps, others = ([torch.randn(2, c, r, r, dtype=torch.float64) for c, r in ((5, 8), (7, 4))] for _ in range(2))
    cosines = [torch.cosine_similarity(a, b, dim=1).mean((1, 2)) for a, b in zip(maps, others, strict=True)]
    torch.testing.assert_close(losses.perceptual_distance(maps, others), 2 - 2 * torch.stack(cosines).mean(0))
    assert losses.perceptual_distance(maps, maps).abs().max() < 1e-12
