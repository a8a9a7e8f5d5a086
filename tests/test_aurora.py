"""The generator as a whole: its parts, its outputs, its presets."""

import dataclasses

import pytest
import torch

from aurora import Generator
from losses import moe_loss
from presets import PRESETS, GeneratorConfig
from upsampler import new_generator


@pytest.fixture
def generator(generator_config):
    """With every zero-initialized weight moved, so that no branch is silent."""
    torch.manual_seed(0)
    generator = Generator(generator_config)
    for parameter in generator.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return generator


def inputs(config, batch=3, length=7):
    torch.manual_seed(1)
    return torch.randn(batch, config.z_dim), torch.randn(batch, length, config.clip_width), torch.tensor([6, 2, 4])


def test_output_has_what_it_promises(generator):
    output = generator(*inputs(generator.config))
    assert {r: tuple(image.shape) for r, image in output.pyramid.items()} == {r: (3, 3, r, r) for r in (4, 8, 16)}
    assert output.image is output.pyramid[16]
    assert output.w.shape == (3, generator.config.w_dim)
    assert output.routings["16.0.0"].logits.shape == (3, 256, 4)
    routes = {name: routing.expert_index for name, routing in output.routings.items()}
    assert {name: tuple(x.shape) for name, x in routes.items()} == {"16.0.0": (3, 256), "16.0.1": (3, 256)}
    assert all(x.dtype == torch.int64 and x.max() < 4 for x in routes.values())


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


def test_stopping_early_gives_the_lower_images(generator):
    whole, part = (generator(*inputs(generator.config), resolution=r) for r in (None, 8))
    assert list(part.pyramid) == [4, 8] and torch.equal(part.image, whole.pyramid[8])


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


def test_changing_only_w_changes_routes(generator):
    _z, tokens, eot = inputs(generator.config)
    _, local_text = generator.text_head(tokens, eot)
    codes = torch.randn(2, 3, generator.config.w_dim) * 3
    layer = generator.synthesis.levels[2].attentions[0].blocks[0]
    features = torch.randn(3, 256, 16)
    routes = [layer(features, w, local_text)[1].expert_index for w in codes]
    assert (routes[0] != routes[1]).any()


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


def test_every_active_parameter_gets_a_gradient(generator):
    """Else DDP waits for ever, also while the generator grows."""
    for resolution in (4, 8, 16):
        generator.zero_grad(set_to_none=True)
        output = generator(*inputs(generator.config), resolution=resolution)
        (moe_loss(output, 0.001) + sum(image.square().mean() for image in output.pyramid.values())).backward()
        active = {
            name
            for i, level in enumerate(generator.config.levels)
            for name, _ in generator.named_parameters()
            if level.resolution <= resolution and name.startswith(f"synthesis.levels.{i}.")
        }
        missing = {name for name in active if generator.get_parameter(name).grad is None}
        assert not missing
        beyond = set(dict(generator.named_parameters())) - active
        assert all(generator.get_parameter(n).grad is None for n in beyond if n.startswith("synthesis."))


def test_w_avg_is_a_running_mean(generator):
    generator.update_w_avg(torch.ones(20), decay=0.75)
    generator.update_w_avg(torch.ones(20), decay=0.75)
    torch.testing.assert_close(generator.w_avg, torch.full((20,), 0.4375))
    generator.update_w_avg(torch.full((20,), torch.nan))
    torch.testing.assert_close(generator.w_avg, torch.full((20,), 0.4375))


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


def test_a_configuration_survives_json(generator_config):
    import json

    restored = GeneratorConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(generator_config))))
    assert restored == generator_config


def test_recomputing_levels_changes_no_gradient(generator_config):
    torch.manual_seed(0)
    generator = Generator(generator_config).double()
    for parameter in generator.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
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
