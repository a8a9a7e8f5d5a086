"""LadaGAN against the authors' outputs, and its formulas in float64."""

import math

import pytest
import torch

from baselines import ladagan
from baselines.ladagan import AdditiveAttention
from tests.weights.test_official import load_renamed, read
from weights.generator_file import without_prefix

# {the authors' names: ours}. They name levels by their number of points.
BLOCK_RENAMES = [
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.h\.0\.", ".hidden."),
    (r"\.mlp_gamma\.", ".scale."),
    (r"\.mlp_beta\.", ".shift."),
    (r"\.attn\.q_attn\.", ".attention.to_weight."),
    (r"\.attn\.to_out\.", ".attention.proj_out."),
    (r"\.attn\.", ".attention."),
]
GENERATOR_RENAMES = [
    *BLOCK_RENAMES,
    (r"^init\.0\.", "start."),
    (r"^ch_conv\.", "levels.2.conv."),
    (r"^pos_(\d+)$", lambda match: f"levels.{LEVELS[match[1]]}.position"),
    (r"^block_(\d+)\.", lambda match: f"levels.{LEVELS[match[1]]}.block."),
    (r"^conv_(\d+)\.", lambda match: f"levels.{LEVELS[match[1]] - 1}.conv."),
]
LEVELS = {"64": 0, "256": 1, "1024": 2}
DISCRIMINATOR_RENAMES = [
    *BLOCK_RENAMES,
    (r"^inp_conv\.", "stem."),
    (r"^encoder\.", "downs."),
    (r"^pos_256$", "position"),
    (r"^(block|conv)_256\.", r"\1."),
    (r"^logits\.0\.", "points.0."),
    (r"^logits\.2\.", "to_logits."),
]


@torch.no_grad()
def test_outputs_are_the_authors():
    state, io = read("ladagan_small")
    generator = ladagan.Generator(64, width=128, num_heads=(4, 4, 2), hidden=(64, 48, 32), z_dim=16)
    discriminator = ladagan.Discriminator([8, 16, 32], 4, hidden=64, code_channels=48, logit_channels=64)
    for network, part, renames in (
        (generator, "generator.", GENERATOR_RENAMES),
        (discriminator, "discriminator.", DISCRIMINATOR_RENAMES),
    ):
        load_renamed(network, without_prefix(state, part), renames)
    torch.testing.assert_close(generator(io["z"]), io["image"], rtol=0, atol=1e-4)
    torch.testing.assert_close(discriminator(io["x"]), io["logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(discriminator.train()(io["x"]), io["logits_training"], rtol=0, atol=1e-4)


def test_size_of_the_paper():
    with torch.device("meta"):
        generator = ladagan.Generator(32, width=1024, z_dim=128)
    assert sum(p.numel() for p in generator.parameters()) / 1e6 == pytest.approx(19.9, abs=0.05)


@torch.no_grad()
def test_additive_attention_is_a_naive_loop():
    """The formulas point by point and head by head, in float64."""
    attention, x = AdditiveAttention(6, num_heads=2).double(), torch.randn(3, 5, 6, dtype=torch.float64)
    expected = torch.empty_like(x)
    for b in range(3):
        rows = [attention.to_qkv.weight @ point + attention.to_qkv.bias for point in x[b]]
        q, k, v = ([row[i : i + 6] for row in rows] for i in (0, 6, 12))
        results = [torch.empty(6, dtype=torch.float64) for _ in rows]
        for head in range(2):
            part = slice(3 * head, 3 * head + 3)
            weight, bias = attention.to_weight.weight[head], attention.to_weight.bias[head]
            scores = [math.exp((weight @ query + bias).item() / math.sqrt(3)) for query in q]
            global_query = sum(score / sum(scores) * query[part] for score, query in zip(scores, q, strict=True))
            for result, key, value in zip(results, k, v, strict=True):
                result[part] = global_query * key[part] * value[part]
        for n, result in enumerate(results):
            expected[b, n] = attention.proj_out.weight @ result + attention.proj_out.bias
    torch.testing.assert_close(attention(x), expected)


def test_r1_is_the_gradient_norm_of_each_image():
    """The definition, image by image."""
    discriminator = ladagan.Discriminator([8, 16], 2, 12, code_channels=12, logit_channels=10).double().eval()
    images, expected = torch.randn(3, 3, 32, 32, dtype=torch.float64), 0.0
    for image in images:
        image = image[None].requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(image).sum(), image)
        expected += gradient.square().sum().item() / 3
    penalty = ladagan.r1_penalty(discriminator, images, None)
    assert penalty.item() == pytest.approx(expected, rel=1e-9)
    penalty.backward()
    assert discriminator.stem[0].weight.grad.abs().sum() > 0


@torch.no_grad()
def test_the_text_adds_its_projection_to_each_patch():
    discriminator = ladagan.Discriminator([8, 16], 2, 12, code_channels=12, logit_channels=10, text_dim=7)
    discriminator.double().eval()
    images, text = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    points = []
    discriminator.points.register_forward_hook(lambda _, __, output: points.append(output))
    added = discriminator(images, text) - discriminator(images)
    for b in range(2):
        direction = discriminator.text(text[b] / text[b].square().mean().sqrt())
        for patch in range(25):
            y, x = divmod(patch, 5)
            mean = points[0][b, :, y : y + 4, x : x + 4].mean((1, 2))
            assert added[b, patch].item() == pytest.approx((mean @ direction).item() / math.sqrt(10), rel=1e-6)


def test_truncation_scales_z():
    generator, z, text = ladagan.Generator(32, 64, hidden=(8,) * 3, text_dim=7), torch.randn(2, 64), torch.randn(2, 7)
    torch.testing.assert_close(generator(z, text, truncation=0.5), generator(z / 2, text))
