"""Every loss against its formula in float64. What ranks share is in training/test_distributed.py."""

import copy
import dataclasses

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

import layers
import losses
from augment import NUM_CHANCES, augment
from aurora import Generator, Output
from clip import from_open_clip, load_clip
from discriminator import CLIP_STAGE, Discriminator
from presets import PRESETS
from router import Routing
from tests import figures
from tests.conftest import double
from tests.figures import TINY, moved


@pytest.mark.parametrize("sign", [-1, 1])
def test_logistic_loss_is_its_formula(sign):
    logits = {
        (entered, stage): torch.randn(3, (stage // 2) ** 2, dtype=torch.float64)
        for entered in (4, 8, 16)
        for stage in (4, 8, 16)
        if stage <= entered
    }
    logits[16, CLIP_STAGE] = torch.randn(3, 4, dtype=torch.float64)
    scale, early = {16: 0.6, 8: 0.3, 4: 0.1}, 0.01
    expected = np.zeros(3)
    for (entered, stage), x in logits.items():
        weight = scale[entered] * (1 if stage in (4, CLIP_STAGE) else early)
        expected += weight * np.log1p(np.exp(sign * x.numpy())).mean(1)
    np.testing.assert_allclose(losses.logistic_loss(logits, sign, early, scale), expected, rtol=1e-12)
    assert losses.last_prediction(logits) is logits[16, 4]


def test_scale_weights_are_the_papers():
    assert losses.scale_weights([4, 8, 16, 32, 64], PRESETS["aurora-64"].recipe.lower_scales) == pytest.approx(
        {64: 0.33 / 1.01, 32: 0.17 / 1.01, 16: 0.17 / 1.01, 8: 0.17 / 1.01, 4: 0.17 / 1.01}
    )


def test_wrong_captions_are_the_next_that_differ():
    ids = torch.tensor([[1, 1], [1, 1], [2, 5], [1, 1], [2, 5], [3, 3]])
    assert losses.wrong_captions(ids).tolist() == [2, 2, 3, 4, 5, 0]
    assert losses.wrong_captions(torch.ones(4, 2, dtype=torch.long)).tolist() == [0, 1, 2, 3]


def vision_transformer():
    vision = dict(image_size=16, layers=4, width=16, head_width=8, patch_size=8)
    text = dict(context_length=7, vocab_size=9, width=12, heads=2, layers=1)
    return from_open_clip(open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text), "test")


@pytest.mark.parametrize("kind", ["convolutions", "vision transformer"])  # whose attention is fused elsewhere
def test_r1_is_the_gradient_norm_of_each_image(discriminator_config, kind):
    """By the definition: image by image, a gradient of that image's own predictions. Its gradient, which needs second
    derivatives of the discriminator and of CLIP, is compared with finite differences.
    """
    torch.manual_seed(0)
    clip = copy.deepcopy(load_clip("emoji") if kind == "convolutions" else vision_transformer()).double()
    config = dataclasses.replace(discriminator_config, clip_maps=clip.map_shapes())
    tiny, tokens, eot = moved(Discriminator(config).double()), double(2, 7, 12), torch.tensor([6, 3])
    pyramid, scales, expected = {r: double(2, 3, r, r) for r in (4, 8)}, {8: 0.7, 4: 0.3}, 0.0
    for entered, scale in scales.items():
        for i in range(2):
            image = pyramid[entered][[i]].requires_grad_()
            one = {r: image if r == entered else x[[i]] for r, x in pyramid.items()}
            logits = tiny(one, clip.see(one[8])[1], tokens[[i]], eot[[i]])
            own = {stage: x for (entry, stage), x in logits.items() if entry == entered}
            score = sum((1 if stage in (4, CLIP_STAGE) else 0.01) * x.mean() for stage, x in own.items())
            (gradient,) = torch.autograd.grad(score, image)
            expected += scale * 100.0 * (entered / 64) ** 2 / 2 * gradient.square().sum().item() / 2
    weights = [
        tiny.stages["8"].from_rgb.bias,
        tiny.stages["8"].body[0].to_v.weight,
        tiny.stages["4"].body[-1].conv.bias,
        tiny.heads["4"].last.weight,
        tiny.map_readers[0][0].conv.weight,
    ]

    def penalty(tokens, *_):
        return losses.r1_penalty(tiny, clip, pyramid, tokens, eot, 100.0, scales)

    assert penalty(tokens).item() == pytest.approx(expected, rel=1e-9)
    assert torch.autograd.gradcheck(penalty, (tokens.requires_grad_(), *weights), fast_mode=True, atol=1e-7)


def test_clip_loss_is_symmetric_info_nce_at_every_resolution_and_reaches_the_images():
    clip, images = load_clip("emoji"), figures.images(range(5), 16)
    text = clip.read([figures.caption(i) for i in range(5)])
    pyramid = {r: image.requires_grad_() for r, image in layers.pyramid(images, [8, 16]).items()}
    embeddings = {r: clip.encode_image(image) for r, image in pyramid.items()}
    expected = {}
    for r, embedding in embeddings.items():
        a, b = F.normalize(embedding.detach().double()), text.embedding.double()
        logits = clip.logit_scale.double() * a @ b.T
        correct = logits.diagonal()
        expected[r] = ((logits.logsumexp(0) - correct).mean() + (logits.logsumexp(1) - correct).mean()).item() / 2
    loss = losses.clip_loss(clip, embeddings, text.embedding, {8: 0.2, 16: 0.8})
    assert loss.item() == pytest.approx(0.2 * expected[8] + 0.8 * expected[16], rel=1e-4)
    loss.backward()
    assert all(image.grad.abs().sum() > 0 for image in pyramid.values())
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


class Objectives:
    """Networks of the preset `tiny`, and a batch of six at 4×4 and 8×8; by default two captions are equal."""

    def __init__(self, captions=None):
        torch.manual_seed(0)
        self.discriminator, self.clip = moved(Discriminator(TINY.discriminator), by=0.05), load_clip("emoji")
        generator = moved(Generator(TINY.generator), by=0.05)
        images = figures.images(range(6), 16)
        ids = self.clip.tokenize(captions or [figures.caption(max(i, 1)) for i in range(6)])
        self.text, self.wrong = self.clip.encode_text(ids), losses.wrong_captions(ids)
        self.real = layers.pyramid(images, [4, 8])
        self.fake = {r: torch.randn(6, 3, r, r) * 0.3 for r in (4, 8)}
        self.chances = torch.rand(6, 2, NUM_CHANCES)
        z = torch.randn(6, TINY.generator.z_dim)
        self.draw = lambda: generator(z, self.text.tokens, self.text.eot, 8)
        self.networks = generator, self.discriminator

    def of_discriminator(self, recipe, real=None, fake=None):
        objective = losses.DiscriminatorLoss(self.discriminator, self.clip, recipe)
        return objective(real or self.real, fake or self.fake, self.text, self.wrong, self.chances)

    def of_generator(self, recipe, output):
        chances = self.chances[:, 1]
        return losses.generator_loss(output, self.text, self.wrong, chances, self.discriminator, self.clip, recipe)


def test_both_objectives_are_the_sum_of_their_parts():
    it = Objectives()
    recipe = dataclasses.replace(TINY.recipe, balance_weight=1.0, adversarial_weight=0.7, clip_lower_every=3)
    tokens, eot, embedding = it.text
    weight = {8: 1 / (1 + recipe.lower_scales), 4: recipe.lower_scales / (1 + recipe.lower_scales)}

    def total(images, of, sign, early):
        """The loss of images under the captions of these indices."""
        logits = it.discriminator(images, it.clip.see(images[8])[1], tokens[of], eot[of])
        return losses.logistic_loss(logits, sign, early, weight).mean().item()

    right = torch.arange(6)
    report = it.of_discriminator(recipe)
    adversarial = total(it.real, right, -1, 0.01) + total(it.fake, right, 1, 0.01)
    matching = total(it.real, it.wrong, 1, 0.05) + total(it.fake, it.wrong, 1, 0.05)
    expected = adversarial + recipe.matching_weight_discriminator * matching
    assert report["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert report["d_matching"].item() == pytest.approx(matching, rel=1e-4)

    output = it.draw()
    report = it.of_generator(recipe, output)
    adversarial, matching = total(output.pyramid, right, -1, 0.01), total(output.pyramid, it.wrong, -1, 0.05)
    high, low = it.clip.encode_image(output.image), it.clip.encode_image(output.pyramid[4][::3])  # of every third
    alignment = losses.clip_loss(it.clip, {8: high}, embedding, weight).item()
    alignment += losses.clip_loss(it.clip, {4: low}, embedding[::3], weight).item()
    assert report["g_clip"].item() == pytest.approx(alignment, rel=1e-6)
    expected = 0.7 * (adversarial + recipe.matching_weight_generator * matching) + recipe.clip_weight * alignment
    assert report["loss"].item() == pytest.approx(expected + losses.moe_loss(output, 1.0).item(), rel=1e-4)


def test_without_a_wrong_caption_nothing_is_matched():
    it = Objectives(["a red circle"] * 6)
    assert it.of_discriminator(TINY.recipe)["d_matching"] == it.of_generator(TINY.recipe, it.draw())["g_matching"] == 0


def test_the_discriminator_sees_augmented_images_and_clip_those_as_they_are():
    """Real and generated ones by chances of their own: as if they had been changed before."""
    it, plain = Objectives(), TINY.recipe
    augmented = dataclasses.replace(plain, augment=("color", "cutout"))
    changed = [augment(x, augmented.augment, it.chances[:, n]) for n, x in enumerate((it.real, it.fake))]
    report, expected = it.of_discriminator(augmented), it.of_discriminator(plain, *changed)
    for name in expected:
        assert report[name].item() == pytest.approx(expected[name].item(), rel=1e-5), name

    output = it.draw()
    changed = dataclasses.replace(output, pyramid=augment(output.pyramid, augmented.augment, it.chances[:, 1]))
    report, expected, without = (
        it.of_generator(recipe, x) for recipe, x in ((augmented, output), (plain, changed), (plain, output))
    )
    for name, source in (("g_adversarial", expected), ("g_matching", expected), ("g_clip", without)):
        assert report[name].item() == pytest.approx(source[name].item(), rel=1e-5), name


def test_bfloat16_is_safe():
    """Under autocast both objectives stay near their float32 values, and every gradient is finite."""
    it, recipe = Objectives(), TINY.recipe
    scales = losses.scale_weights(it.real, recipe.lower_scales)

    def both():
        d_report = it.of_discriminator(recipe)
        d_report["r1"] = losses.r1_penalty(it.discriminator, it.clip, it.real, *it.text[:2], recipe.r1_gamma, scales)
        return d_report | {f"g_{name}": value for name, value in it.of_generator(recipe, it.draw()).items()}

    exact, clip_sees_in = both(), []
    note = it.clip.visual.conv1.register_forward_hook(lambda _, inputs, output: clip_sees_in.append(output.dtype))
    with note, torch.autocast("cpu", torch.bfloat16):
        rounded = both()
    assert clip_sees_in == [torch.bfloat16, torch.float32, torch.bfloat16]  # for D, for R1, for G
    for name in exact:
        tolerance = 1e-6 if name == "r1" else 0.05  # R1 is in float32 throughout
        assert rounded[name].item() == pytest.approx(exact[name].item(), rel=tolerance), name
    (rounded["loss"] + rounded["r1"] + rounded["g_loss"]).backward()
    for network in it.networks:
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_the_perceptual_distance_is_that_between_directions_of_features():
    """2 − 2·cosine at each point."""
    maps, others = ([torch.randn(2, c, r, r, dtype=torch.float64) for c, r in ((5, 8), (7, 4))] for _ in range(2))
    cosines = [torch.cosine_similarity(a, b, dim=1).mean((1, 2)) for a, b in zip(maps, others, strict=True)]
    torch.testing.assert_close(losses.perceptual_distance(maps, others), 2 - 2 * torch.stack(cosines).mean(0))
    assert losses.perceptual_distance(maps, maps).abs().max() < 1e-12
