"""LadaGAN against the authors' outputs, additive attention against a naive loop, and what a step changes."""

import copy
import math

import numpy as np
import pytest
import torch

from baselines import ladagan
from baselines.ladagan import AdditiveAttention, LadaGAN
from clip import load_clip
from tests.baselines.test_stylegan_t import changed
from tests.weights.test_official import FIXTURES, read

AUTHORS = FIXTURES[0].parent / "ladagan_small.npz"


@pytest.fixture
def authors():
    """The authors' state dict, and inputs and outputs as tensors."""
    state, io = read(AUTHORS)
    return state, {key: torch.from_numpy(value) for key, value in io.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The authors' weights.


@torch.no_grad()
def test_outputs_are_the_authors(authors):
    state, io = authors
    generator, discriminator = ladagan.load_official(state)
    torch.testing.assert_close(generator(io["z"]), io["image"], rtol=0, atol=1e-4)
    torch.testing.assert_close(discriminator(io["x"]), io["logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(discriminator.train()(io["x"]), io["logits_training"], rtol=0, atol=1e-4)


def authors_state():
    """A random state dict with the authors' names, of other sizes: 32×32, and a width of 64."""
    shapes = {"generator.init.0.weight": (64 * 64, 10), "discriminator.pos_256": (1, 256, 20)}

    def dense(name, outputs, inputs, size=(), bias=True):
        shapes[f"{name}.weight"] = (outputs, inputs, *size)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def block(name, channels, heads, hidden):
        dense(f"{name}.attn.to_qkv", 3 * channels, channels)
        dense(f"{name}.attn.q_attn", heads, channels)
        dense(f"{name}.attn.to_out", channels, channels)
        dense(f"{name}.mlp.0", hidden, channels)
        dense(f"{name}.mlp.2", channels, hidden)

    for points, channels, heads, hidden in ((64, 64, 8, 24), (256, 16, 4, 20), (1024, 4, 1, 16)):
        shapes[f"generator.pos_{points}"] = (1, points, channels)
        name = f"generator.block_{points}"
        block(name, channels, heads, hidden)
        for norm in ("ln_1", "ln_2"):
            dense(f"{name}.{norm}.h.0", channels, 10)
            dense(f"{name}.{norm}.mlp_gamma", channels, channels)
            dense(f"{name}.{norm}.mlp_beta", channels, channels)
    for name, outputs, inputs in (("conv_256", 16, 16), ("conv_1024", 4, 4), ("ch_conv", 3, 4)):
        dense(f"generator.{name}", outputs, inputs, (3, 3))

    def batch_norm(name, channels):
        for kind in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{kind}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    dense("discriminator.inp_conv.0", 12, 3, (3, 3), bias=False)
    encoder = "discriminator.encoder.0"
    for name, inputs, size in (("main.0", 12, 3), ("main.3", 20, 3), ("direct.1", 12, 1)):
        dense(f"{encoder}.{name}", 20, inputs, (size, size), bias=False)
    for name in ("main.1", "main.4", "direct.2"):
        batch_norm(f"{encoder}.{name}", 20)
    block("discriminator.block_256", 20, 5, 36)
    shapes |= {f"discriminator.block_256.{n}.{k}": (20,) for n in ("ln_1", "ln_2") for k in ("weight", "bias")}
    dense("discriminator.conv_256", 28, 80, (3, 3))
    dense("discriminator.logits.0", 44, 28, (1, 1), bias=False)
    dense("discriminator.logits.2", 1, 44, (4, 4), bias=False)
    return {name: torch.rand(shape) for name, shape in shapes.items()}


@torch.no_grad()
def test_other_sizes_load():
    generator, discriminator = ladagan.load_official(authors_state())
    images = generator(torch.randn(2, 10))
    assert images.shape == (2, 3, 32, 32)
    assert discriminator(images).shape == (2, 25)
    assert [level.block.attention.num_heads for level in generator.levels] == [8, 4, 1]
    assert discriminator.block.attention.num_heads == 5


def test_size_of_the_paper():
    with torch.device("meta"):
        generator = ladagan.Generator(32, width=1024, z_dim=128)
    assert sum(p.numel() for p in generator.parameters()) / 1e6 == pytest.approx(19.9, abs=0.05)


@pytest.mark.parametrize("damage", ["missing", "misshapen", "foreign"])
def test_what_is_no_ladagan_is_refused_in_one_line(authors, damage):
    state, _ = authors
    if damage == "missing":
        del state["discriminator.encoder.1.direct.1.weight"]
    elif damage == "misshapen":
        state["generator.conv_256.weight"] = state["generator.conv_256.weight"][:-1]
    else:
        state = {"conv1.weight": np.zeros((3, 3))}
    with pytest.raises(ValueError, match="authors' state of LadaGAN") as caught:
        ladagan.load_official(state)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# Formulas.


@torch.no_grad()
def test_additive_attention_is_a_naive_loop():
    """Point by point and head by head, from the formulas, in float64."""
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


def test_additive_attention_passes_gradcheck():
    """Its second derivatives too, which R1 needs."""
    attention = AdditiveAttention(4, num_heads=2).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention, x)
    assert torch.autograd.gradgradcheck(attention, x)


def small_discriminator(text_dim=0):
    return ladagan.Discriminator([8, 16], 2, 12, code_channels=12, logit_channels=10, text_dim=text_dim)


def test_r1_is_the_gradient_norm_of_each_image():
    """By the definition: image by image."""
    discriminator = small_discriminator().double().eval()
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
    discriminator = small_discriminator(text_dim=7).double().eval()
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


# ----------------------------------------------------------------------------------------------------------------------
# The system.


@pytest.fixture(scope="module")
def clip():
    return load_clip("emoji")


@pytest.fixture(scope="module")
def text(clip):
    return clip.read(["red heart", "cat", "sun", "tree"])


def states(system):
    networks = {**system.networks, "clip": system.clip}
    return {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}


@pytest.mark.parametrize("number", [0, 1], ids=["with R1", "without R1"])
@pytest.mark.parametrize("unconditional", [False, True])
def test_a_step_changes_what_learns_and_nothing_else(clip, text, number, unconditional):
    torch.manual_seed(0)
    system = LadaGAN(clip, 32, "cpu", unconditional)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    before, kept = states(system), images.clone()
    report = system.step(number, images, text, torch.Generator().manual_seed(1))
    assert changed(before, states(system)) == {"generator", "discriminator", "ema"}
    assert torch.equal(images, kept) and not images.requires_grad
    assert all(value.ndim == 0 and value.isfinite() for value in report.values())
    assert ("r1" in report) == (number == 0)
    for name in ("generator", "discriminator"):
        for key, parameter in system.networks[name].named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key


def test_the_reported_loss_is_adversarial_and_r1(clip, text):
    system = LadaGAN(clip, 32, "cpu")
    report = system.step(16, torch.rand(4, 3, 32, 32), text, torch.Generator().manual_seed(1))
    expected = report["d_adversarial"] + 16 * 1e-4 * report["r1"]
    assert report["d_loss"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("resolution", [32, 64])
def test_what_is_drawn_follows_the_text_unless_unconditional(clip, text, resolution):
    z, other = torch.randn(4, 64), type(text)(*(x.flip(0) for x in text))
    for unconditional in (False, True):
        system = LadaGAN(clip, resolution, "cpu", unconditional)
        images = system.draw(z, text)
        assert images.shape == (4, 3, resolution, resolution) and images.abs().max() <= 1
        assert torch.equal(images, system.draw(z, other)) == unconditional
        assert torch.equal(system.draw(z, text, truncation=0.5), system.draw(z / 2, text))


def test_samples_are_reproducible(clip, text):
    system = LadaGAN(clip, 32, "cpu")
    images = system.sample(text, seed=4, count=2)
    assert images.shape == (8, 3, 32, 32)
    assert torch.equal(images, system.sample(text, seed=4, count=2))
    assert not torch.equal(images, system.sample(text, seed=5, count=2))
