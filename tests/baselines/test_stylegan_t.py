"""StyleGAN-T against the authors' outputs, and its formulas in float64."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from baselines import stylegan_t
from baselines.stylegan_t import StyleGANT
from clip import load_clip
from tests.weights.test_official import load_renamed, read
from weights.efficientnet import load_efficientnet

# {the authors' names: ours}. Names that become "" are of constants.
RENAMES = [
    (r".*\.(resample_filter|transform)$", ""),
    (r"^mapping\.x_avg$", "x_avg"),
    (r"^mapping\.mlp\.fc", "mapping.layers."),
    (r"^synthesis\.b\d+\.input\.", "fourier."),
    (r"^synthesis\.b(\d+)\.", lambda match: f"levels.{int(math.log2(int(match[1]) // 8))}."),
    (r"\.conv0\.", ".up."),
    (r"\.convs1\.", ".layers."),
    (r"\.torgb\.", ".to_rgb."),
    (r"^(levels\.\d+\.(?:up|layers\.\d+))\.(weight|bias|affine)", r"\1.conv.\2"),
    (r"^(levels\..*)\.affine\.proj\.", r"\1.style."),
]
HEAD_RENAMES = [
    (r"^main\.0\.", "pointwise."),
    (r"^main\.1\.fn\.", "mixing."),
    (r"^cls\.", "to_code."),
    (r"^cmapper\.", "text."),
    (r"\.0\.(bias|weight)", r".conv.\1"),
    (r"\.1\.(bias|weight)$", r".norm.\1"),
    (r"weight_orig$", "parametrizations.weight.original"),
    (r"weight_([uv])$", r"parametrizations.weight.0._\1"),
]


@torch.no_grad()
def test_the_generators_outputs_are_the_authors():
    state, io = read("stylegan_t_small")
    sizes = {8: 64, 16: 64, 32: 32}
    depth = sum(name.startswith("synthesis.b8.") and name.endswith(".gamma") for name in state)
    generator = load_renamed(stylegan_t.Generator(sizes, depth, z_dim=16, text_dim=24), state, RENAMES)
    inputs = io["z"], io["c"]
    torch.testing.assert_close(generator.latent(*inputs), io["w"], rtol=0, atol=1e-5)
    torch.testing.assert_close(generator(*inputs), io["image"], rtol=0, atol=1e-4)
    torch.testing.assert_close(generator(*inputs, truncation=0.6), io["image_psi_06"], rtol=0, atol=1e-4)
    for name, parameter in generator.named_parameters():
        if name.endswith("noise_strength"):
            parameter.zero_()
    torch.testing.assert_close(generator(*inputs), io["image_no_noise"], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_heads_logits_are_the_authors():
    state, io = read("stylegan_t_head")
    logits = load_renamed(stylegan_t.Head(48, text_dim=20, dim=16), state, HEAD_RENAMES)(io["x"], io["c"])
    torch.testing.assert_close(logits, io["logits"].squeeze(1), rtol=0, atol=1e-4)


def test_sizes_of_the_paper():
    with torch.device("meta"):
        generator = stylegan_t.Generator(dict.fromkeys((8, 16, 32, 64), 256), depth=1, text_dim=768)
        discriminator = stylegan_t.Discriminator([384] * 5, text_dim=768)
    for network, millions in ((generator, 16.2), (discriminator, 7.75)):
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


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


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.7, 2.0])
def test_blur_is_a_gaussian(sigma):
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = images.numpy()
    if radius := math.floor(3 * sigma):
        expected = gaussian_filter(expected, sigma, axes=(2, 3), mode="mirror", radius=radius)
    np.testing.assert_allclose(stylegan_t.blur(images, sigma), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_taps_are_outputs_of_the_stages():
    """The last stage at each resolution of the whole network, which evaluation uses."""
    network, whole, outputs = stylegan_t.FrozenFeatures(side=32), load_efficientnet(), []
    for stage in (0, 1, 2, 4, 6):
        whole.blocks[stage].register_forward_hook(lambda _, __, output: outputs.append(output))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    whole(images)
    for seen, output, channels in zip(network(images), outputs, network.channels, strict=True):
        torch.testing.assert_close(seen, output.flatten(2))
        assert seen.shape[1] == channels


def test_the_blur_fades_by_the_images_seen(monkeypatch):
    assert [stylegan_t.blur_sigma(images, 32) for images in (0, 5_000, 10_000, 99_999)] == [2.0, 1.0, 0.0, 0.0]
    system, sigmas = StyleGANT(load_clip("emoji"), 32, "cpu"), set()
    monkeypatch.setattr(stylegan_t, "blur", lambda images, sigma: sigmas.add(sigma) or images)
    images, text = torch.rand(2, 3, 32, 32) * 2 - 1, system.clip.read(["red heart", "cat"])
    system.step(100, images, text, torch.Generator().manual_seed(1))
    assert sigmas == {stylegan_t.blur_sigma(100 * 2, 32)}
