"""The generator as a whole: its parts, its outputs, its presets."""

import dataclasses

import pytest
import torch

from aurora import Generator
from losses import moe_loss
from presets import PRESETS
from tests.figures import moved
from upsampler import new_generator


@pytest.fixture
def generator(generator_config):
    torch.manual_seed(0)
    return moved(Generator(generator_config))


def inputs(config, batch=3, length=7):
    torch.manual_seed(1)
    return torch.randn(batch, config.z_dim), torch.randn(batch, length, config.clip_width), torch.tensor([6, 2, 4])


def test_the_three_parts_make_the_whole(generator):
    z, tokens, eot = inputs(generator.config)
    whole = generator(z, tokens, eot)
    global_text, local_text = generator.text_head(tokens, eot)
    assert global_text.shape == (3, 16) and local_text.shape == (3, 6, 16)
    w = generator.mapping(z, global_text)
    torch.testing.assert_close(generator.synthesis(w, local_text).image, whole.image)
    per_layer = w[:, None].repeat(1, generator.synthesis.num_layers, 1)
    torch.testing.assert_close(generator.synthesis(per_layer, local_text).image, whole.image)


def test_a_later_layers_code_leaves_earlier_images_alone(generator):
    z, tokens, eot = inputs(generator.config)
    global_text, local_text = generator.text_head(tokens, eot)
    ws = generator.mapping(z, global_text)[:, None].repeat(1, generator.synthesis.num_layers, 1)
    other = ws.clone()
    other[:, -1] += 1
    first, second = generator.synthesis(ws, local_text), generator.synthesis(other, local_text)
    assert torch.equal(first.pyramid[8], second.pyramid[8]) and not torch.equal(first.image, second.image)


def test_the_text_reaches_the_image_in_both_ways(generator):
    """Through w, by the global text, and through cross-attention, by the local text."""
    z, tokens, eot = inputs(generator.config)
    global_text, local_text = generator.text_head(tokens, eot)
    w = generator.mapping(z, global_text)
    image = generator.synthesis(w, local_text).image
    assert not torch.allclose(generator.synthesis(w, local_text.roll(1, 0)).image, image)
    assert not torch.allclose(
        generator.synthesis(generator.mapping(z, global_text.roll(1, 0)), local_text).image, image
    )


def test_words_mix_in_training_and_not_in_the_release(generator_config):
    """What a token becomes depends on the other words, on none after the end of the text; in the release on itself."""
    tokens, eot = torch.randn(1, 7, 12), torch.tensor([4])
    before, after = tokens.clone(), tokens.clone()
    before[0, 1] += 1
    after[0, 6] += 1
    mixing = Generator(generator_config).text_head
    alone = Generator(dataclasses.replace(generator_config, mix_tokens=False)).text_head
    alone.load_state_dict(mixing.state_dict())
    assert not torch.allclose(mixing(before, eot)[0], mixing(tokens, eot)[0])
    torch.testing.assert_close(mixing(after, eot)[0], mixing(tokens, eot)[0])
    torch.testing.assert_close(alone(before, eot)[0], alone(tokens, eot)[0])


def test_presets():
    counts = {}
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in new_generator(preset.generator).parameters())
        resolutions = preset.generator.resolutions
        assert resolutions == [level.resolution for level in preset.discriminator.levels if level.takes_images]
        assert list(preset.recipe.images_per_phase) == resolutions[:-1]
    assert counts["aurora-64"] == 1_166_329_387
    assert 90e6 < counts["small-64"] < 110e6


def test_recomputing_levels_changes_no_gradient(generator_config):
    torch.manual_seed(0)
    generator = moved(Generator(generator_config).double())
    z, tokens = torch.randn(2, 16, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    gradients = []
    for generator.synthesis.recompute in (False, True):
        output = generator(z, tokens, torch.tensor([3, 6]))
        loss = sum(image.square().sum() for image in output.pyramid.values()) + moe_loss(output, 0.001)
        gradients.append(torch.autograd.grad(loss, list(generator.parameters())))
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


def test_precision_does_not_depend_on_whether_gradients_are_wanted(generator):
    """Fakes for the discriminator are drawn without, those for the generator's own loss with."""
    arguments = inputs(generator.config)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = generator(*arguments)
        with torch.no_grad():
            unwanted = generator(*arguments)
    assert wanted.image.requires_grad and not unwanted.image.requires_grad
    assert all(torch.equal(wanted.pyramid[r], unwanted.pyramid[r]) for r in wanted.pyramid)
    assert all(torch.equal(wanted.routings[n].expert_index, r.expert_index) for n, r in unwanted.routings.items())
