"""StyleGAN-T against the authors' outputs, its formulas in float64, and what a step changes."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from baselines import features, stylegan_t
from baselines.stylegan_t import StyleGANT
from clip import load_clip
from common.cli import UserError
from tests.weights.test_official import FIXTURES, read
from weights.efficientnet import load_efficientnet

AUTHORS = {name: FIXTURES[0].parent / f"stylegan_t_{name}.npz" for name in ("small", "head")}


def authors(name):
    """→ the authors' state dict, and inputs and outputs as tensors."""
    state, io = read(AUTHORS[name])
    return state, {key: torch.from_numpy(value) for key, value in io.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The authors' weights.


@torch.no_grad()
def test_the_generators_outputs_are_the_authors():
    state, io = authors("small")
    generator, inputs = stylegan_t.load_official(state), (io["z"], io["c"])
    torch.testing.assert_close(generator.latent(*inputs), io["w"], rtol=0, atol=1e-5)
    torch.testing.assert_close(generator(*inputs), io["image"], rtol=0, atol=1e-4)
    torch.testing.assert_close(generator(*inputs, truncation=0.6), io["image_psi_06"], rtol=0, atol=1e-4)
    torch.testing.assert_close(generator(*inputs, noise="none"), io["image_no_noise"], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_heads_logits_are_the_authors():
    state, io = authors("head")
    logits = stylegan_t.load_official_head(state)(io["x"], io["c"])
    torch.testing.assert_close(logits, io["logits"].squeeze(1), rtol=0, atol=1e-4)


def authors_state(channels, depth, z_dim, text_dim):
    """A random state dict with the authors' names, of other sizes."""
    w_dim, below, state = z_dim + text_dim, channels[8], {"mapping.x_avg": torch.randn(z_dim)}
    for i in range(2):
        state |= {f"mapping.mlp.fc{i}.weight": torch.randn(z_dim, z_dim), f"mapping.mlp.fc{i}.bias": torch.randn(z_dim)}
    fourier = {"weight": (below, below), "transform": (3, 3), "freqs": (below, 2), "phases": (below,)}
    fourier |= {"affine.weight": (4, w_dim), "affine.bias": (4,)}
    state |= {f"synthesis.b8.input.{name}": torch.randn(shape) for name, shape in fourier.items()}

    def styled(prefix, out_channels, in_channels, size):
        shapes = {"weight": (out_channels, in_channels, size, size), "bias": (out_channels,)}
        shapes |= {"affine.proj.weight": (3 * in_channels, w_dim), "affine.proj.bias": (3 * in_channels,)}
        return {f"{prefix}.{name}": torch.randn(shape) for name, shape in shapes.items()}

    for r, c in channels.items():
        layers = {f"convs1.{i}": c for i in range(2 * depth)} | ({"conv0": below} if r > 8 else {})
        for name, in_channels in layers.items():
            prefix = f"synthesis.b{r}.{name}"
            state |= styled(prefix, c, in_channels, 3)
            state |= {f"{prefix}.noise_const": torch.randn(r, r), f"{prefix}.noise_strength": torch.randn(())}
            state[f"{prefix}.resample_filter"] = torch.randn(4, 4)
            if name.startswith("convs1") and int(name[-1]) % 2:
                state[f"{prefix}.gamma"] = torch.randn(1, c, 1, 1)
                state |= {f"{prefix}.norm.{kind}": torch.randn(c) for kind in ("weight", "bias")}
        state |= styled(f"synthesis.b{r}.torgb", 3, c, 1)
        below = c
    return state


@torch.no_grad()
def test_other_sizes_load():
    channels = {8: 96, 16: 64, 32: 64, 64: 32}
    state = authors_state(channels, depth=1, z_dim=6, text_dim=10)
    generator = stylegan_t.load_official(state)
    assert {level.to_rgb.weight.shape[2] for level in generator.levels} == set(channels.values())
    assert generator(torch.randn(2, 6), torch.randn(2, 10)).shape == (2, 3, 64, 64)
    up = generator.levels[1].up.conv
    torch.testing.assert_close(up.weight[0], state["synthesis.b16.conv0.weight"], rtol=0, atol=0)
    scaled = state["synthesis.b16.conv0.affine.proj.weight"] / math.sqrt(16)  # equalized: theirs is scaled in use
    torch.testing.assert_close(up.style.weight, scaled)


def test_sizes_of_the_paper():
    with torch.device("meta"):
        generator = stylegan_t.Generator(dict.fromkeys((8, 16, 32, 64), 256), depth=1, text_dim=768)
        discriminator = stylegan_t.Discriminator([384] * 5, text_dim=768)
    for network, millions in ((generator, 16.2), (discriminator, 7.75)):
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("damage", ["missing", "misshapen", "foreign"])
def test_what_is_no_generator_is_refused_in_one_line(damage):
    state, _ = authors("small")
    if damage == "missing":
        del state["synthesis.b16.conv0.weight"]
    elif damage == "misshapen":
        state["mapping.mlp.fc1.weight"] = state["mapping.mlp.fc1.weight"][:-1]
    else:
        state = {"conv1.weight": np.zeros((3, 3))}
    with pytest.raises(ValueError, match="a StyleGAN-T generator") as caught:
        stylegan_t.load_official(state)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="a head of"):
        stylegan_t.load_official_head(state)


# ----------------------------------------------------------------------------------------------------------------------
# Formulas.


def test_truncation_leaves_the_text_alone():
    generator = stylegan_t.Generator({8: 32}, z_dim=6, text_dim=10)
    generator.x_avg.normal_()
    z, c = torch.randn(3, 6), torch.randn(3, 10)
    full, half, none = (generator.latent(z, c, psi) for psi in (1.0, 0.5, 0.0))
    for w in (full, half, none):
        assert torch.equal(w[:, 6:], c)
    torch.testing.assert_close(none[:, :6], generator.x_avg.expand(3, 6))
    torch.testing.assert_close(half[:, :6], (full[:, :6] + generator.x_avg) / 2)


def test_residual_layers_start_at_the_normalized_identity():
    layer = stylegan_t.ResidualLayer(32, 8, w_dim=5)
    x = torch.randn(2, 32, 8, 8)
    torch.testing.assert_close(layer(x, torch.randn(2, 5), "none"), layer.norm(x) * math.sqrt(2), rtol=0, atol=1e-3)


def test_images_begin_with_the_contrast_of_pictures():
    torch.manual_seed(0)
    generator = stylegan_t.Generator({8: 256, 16: 128, 32: 64})
    images = generator(torch.randn(16, 64), F.normalize(torch.randn(16, 64)))
    assert 0.3 < images.std() < 1.5


def test_noise_is_the_layers_own_or_drawn_for_each_image():
    generator = stylegan_t.Generator({8: 32}, z_dim=6, text_dim=10)
    for layer in generator.levels[0].layers:
        torch.nn.init.ones_(layer.noise_strength)
    w = generator.latent(torch.randn(1, 6), torch.randn(1, 10)).repeat(2, 1)
    first, second = generator.synthesize(w)
    torch.testing.assert_close(first, second)
    drawn = generator.synthesize(w, torch.Generator().manual_seed(0))
    assert not torch.allclose(*drawn, atol=1e-2)
    torch.testing.assert_close(drawn, generator.synthesize(w, torch.Generator().manual_seed(0)))


@torch.no_grad()
def test_local_batch_norm_is_that_of_each_group():
    norm, x = stylegan_t.LocalBatchNorm(3).double(), torch.randn(12, 3, 7, dtype=torch.float64)
    norm.weight.normal_()
    norm.bias.normal_()
    expected = torch.empty_like(x)
    for group in (slice(0, 6), slice(6, 12)):  # ⌈12/8⌉ = 2 groups
        for channel in range(3):
            part = x[group, channel]
            part = (part - part.mean()) / (part.var(unbiased=False) + 1e-5).sqrt()
            expected[group, channel] = part * norm.weight[channel] + norm.bias[channel]
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("sign", [-1, 1])
def test_hinge_loss_is_its_formula(sign):
    logits = [torch.randn(3, n, dtype=torch.float64) * 2 for n in (4, 9)]
    expected = np.mean([np.maximum(0, 1 + sign * x.numpy()).mean() for x in logits])
    assert stylegan_t.hinge_loss(logits, sign).item() == pytest.approx(expected, rel=1e-12)


def test_guidance_is_the_squared_angle():
    x, y = np.random.default_rng(0).normal(size=(2, 5, 6))
    cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    distance = stylegan_t.spherical_distance(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(distance, np.arccos(cosine) ** 2, rtol=1e-12)


def test_guidance_has_a_finite_slope_where_directions_meet():
    x = torch.randn(4, 6)
    x = torch.cat([x, x]).requires_grad_()
    stylegan_t.spherical_distance(x, torch.cat([x[:4], -x[4:]]).detach()).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.7, 2.0])
def test_blur_is_a_gaussian(sigma):
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = images.numpy()
    if radius := math.floor(3 * sigma):
        expected = gaussian_filter(expected, sigma, axes=(2, 3), mode="mirror", radius=radius)
    np.testing.assert_allclose(stylegan_t.blur(images, sigma), expected, rtol=0, atol=1e-6)


def test_blur_fades():
    sigmas = [stylegan_t.blur_sigma(images, 32) for images in (0, 5_000, 10_000, 99_999)]
    assert sigmas == [2.0, 1.0, 0.0, 0.0]


# ----------------------------------------------------------------------------------------------------------------------
# The frozen networks.


@torch.no_grad()
def test_a_vits_taps_are_its_tokens_with_cls_added():
    vit = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=12, depth=4, num_heads=2, num_classes=0)
    vit.default_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    frozen, outputs = features.vit_features(vit), []
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    taps = frozen(images)
    for module in (vit.pos_drop, *vit.blocks):
        module.register_forward_hook(lambda _, __, output: outputs.append(output))
    mean, std = (torch.tensor(vit.default_cfg[name])[:, None, None] for name in ("mean", "std"))
    vit.eval()(((images + 1) / 2 - mean) / std)
    for seen, output in zip(taps, outputs, strict=True):
        expected = torch.stack([output[:, 1 + n] + output[:, 0] for n in range(16)], dim=2)
        torch.testing.assert_close(seen, expected)


@torch.no_grad()
def test_the_efficientnets_taps_are_what_its_stages_make():
    """Those of the whole network, that evaluation uses, the last at each resolution."""
    network, whole, outputs = features.efficientnet(side=32), load_efficientnet(), []
    assert network.channels == [16, 24, 40, 112, 320]
    assert not network.train().model.training
    for stage in (0, 1, 2, 4, 6):
        whole.blocks[stage].register_forward_hook(lambda _, __, output: outputs.append(output))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    whole(images)
    for seen, output in zip(network(images), outputs, strict=True):
        torch.testing.assert_close(seen, output.flatten(2))


def test_dino_without_a_network_says_what_to_do(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: (_ for _ in ()).throw(OSError("no network\nat all")))
    with pytest.raises(UserError, match=r"cannot be had \(no network\)") as caught:
        features.dino()
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# The system.


@pytest.fixture(scope="module")
def clip():
    return load_clip("emoji")


@pytest.fixture(scope="module")
def ids(clip):
    return clip.tokenize(["red heart", "blue heart", "cat", "dog", "sun", "moon", "tree", "red car"])


@pytest.fixture
def system(clip):
    torch.manual_seed(0)
    return StyleGANT(clip, 32, "cpu")


def states(system):
    """Every tensor that a step might change, by the name of its network."""
    networks = {**system.networks, "features": system.features, "clip": system.clip}
    return {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}


def changed(before, after):
    """The names of the networks of which a tensor changed."""
    return {
        name for name in before if any(not torch.equal(before[name][key], after[name][key]) for key in before[name])
    }


def batch(clip, ids):
    return torch.rand(len(ids), 3, 32, 32) * 2 - 1, clip.encode_text(ids)


def test_a_step_changes_what_learns_and_nothing_else(system, clip, ids):
    images, text = batch(clip, ids)
    before, kept = states(system), images.clone()
    report = system.step(0, images, text, torch.Generator().manual_seed(1))
    assert changed(before, states(system)) == {"generator", "discriminator", "ema"}
    assert torch.equal(images, kept)
    assert all(value.ndim == 0 and value.isfinite() for value in report.values())
    for name in ("generator", "discriminator"):
        for key, parameter in system.networks[name].named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    assert not torch.equal(system.networks["ema"].x_avg, before["ema"]["x_avg"])


def test_a_step_depends_on_its_generator_alone(clip, ids):
    reports = []
    for ambient in (0, 1):
        torch.manual_seed(0)
        system = StyleGANT(clip, 32, "cpu")
        images, text = batch(clip, ids)
        torch.manual_seed(ambient)
        reports.append(system.step(3, images, text, torch.Generator().manual_seed(7)))
    assert reports[0] == reports[1]


def test_the_blur_fades_by_the_images_of_all_ranks(system, clip, ids, monkeypatch):
    sigmas = set()
    monkeypatch.setattr(stylegan_t, "blur", lambda images, sigma: sigmas.add(sigma) or images)
    monkeypatch.setattr(stylegan_t.distributed, "world_size", lambda: 4)
    system.step(100, *batch(clip, ids), torch.Generator().manual_seed(1))
    assert sigmas == {stylegan_t.blur_sigma(100 * len(ids) * 4, 32)}


def test_the_reported_loss_is_adversarial_and_guidance(system, clip, ids):
    report = system.step(0, *batch(clip, ids), torch.Generator().manual_seed(1))
    assert report["g_loss"].item() == pytest.approx((report["g_adversarial"] + 0.2 * report["g_clip"]).item())


def test_the_second_phase_trains_the_text_encoder_against_the_frozen_one(system, clip, ids):
    tower, optimizer = stylegan_t.text_tower(clip)
    images, text = batch(clip, ids)
    torch.testing.assert_close(tower.encode_text(ids).embedding, text.embedding, rtol=0, atol=1e-5)
    before, tower_before = states(system), copy.deepcopy(tower.state_dict())
    noise = torch.Generator().manual_seed(1)
    report = stylegan_t.step_text_encoder(system, tower, optimizer, 0, images, ids, text, noise)
    assert changed(before, states(system)) == {"discriminator"}
    moved = {name: (x - tower_before[name]).abs().max().item() for name, x in tower.state_dict().items()}
    assert 0 < max(moved.values()) < 1e-5  # one of Adam's steps at 3e-6
    assert report["g_loss"].item() == pytest.approx((report["g_adversarial"] + 50 * report["g_clip"]).item(), rel=1e-5)


def test_samples_are_by_the_moving_average_and_come_caption_by_caption(system, clip, ids):
    text = clip.encode_text(ids[:2])
    images = system.sample(text, seed=4, count=3)
    assert images.shape == (6, 3, 32, 32) and images.abs().max() <= 1
    assert torch.equal(images, system.sample(text, seed=4, count=3))
    z = torch.randn(6, 64, generator=torch.Generator().manual_seed(4))
    c = text.embedding[[0, 0, 0, 1, 1, 1]]
    with torch.no_grad():
        torch.testing.assert_close(images, system.networks["ema"](z, c).clamp(-1, 1))
        system.networks["generator"].requires_grad_(False).x_avg.fill_(9)
    assert torch.equal(images, system.sample(text, seed=4, count=3))
    same = system.sample(text, seed=4, count=3, truncation=0.0)
    torch.testing.assert_close(same[:3], same[:1].expand(3, -1, -1, -1), rtol=0, atol=1e-5)


def test_the_state_of_a_system_is_restored_by_name(system, clip, ids):
    system.step(0, *batch(clip, ids), torch.Generator().manual_seed(1))
    other = StyleGANT(clip, 32, "cpu")
    for kind in ("networks", "optimizers"):
        for name, holder in getattr(other, kind).items():
            holder.load_state_dict(copy.deepcopy(getattr(system, kind)[name].state_dict()))
    images, text = batch(clip, ids)
    first, second = (s.step(1, images, text, torch.Generator().manual_seed(2)) for s in (system, other))
    assert first == second


def test_other_resolutions_are_refused(clip):
    with pytest.raises(UserError, match="resolution 48: StyleGANT draws at 32 or 64"):
        StyleGANT(clip, 48, "cpu")
