"""A generator made ready to sample draws what it drew before, in float32 and in bfloat16."""

import copy
import dataclasses

import pytest
import torch

from aurora import Generator
from sampling import inference
from sampling.pipeline import routers
from tests.figures import moved


@pytest.fixture
def generator(generator_config):
    """Its lowest level has many channels."""
    torch.manual_seed(0)
    lowest, *higher = generator_config.levels
    lowest = dataclasses.replace(lowest, channels=64)
    generator_config = dataclasses.replace(generator_config, levels=(lowest, *higher))
    return moved(Generator(generator_config))


def inputs(config, batch):
    torch.manual_seed(1)
    return torch.randn(batch, config.z_dim), torch.randn(batch, 7, config.clip_width), torch.full((batch,), 6)


@pytest.mark.parametrize("batch", [1, 8], ids=["matrix products", "convolutions"])
def test_freezing_changes_no_picture(generator, batch):
    """At batch 1 the lowest maps are smaller than the kernels. In float64, so that rounding hides nothing."""
    generator.double()
    arguments = [x.double() if x.is_floating_point() else x for x in inputs(generator.config, batch)]
    before = generator(*arguments)
    after = inference.prepare(generator, torch.float64)(*arguments)
    torch.testing.assert_close(after.image, before.image)
    assert all(torch.equal(after.routings[n].expert_index, r.expert_index) for n, r in before.routings.items())


def test_bfloat16_keeps_routing_and_latent_codes_in_float32(generator):
    half = inference.prepare(generator, torch.bfloat16)
    kept = {id(p) for module in half.modules() if hasattr(module.forward, "in_float32") for p in module.parameters()}
    kept |= {id(p) for p in half.text_head.parameters()}
    for name, parameter in half.named_parameters():
        narrow = parameter.ndim > 1 and id(parameter) not in kept
        assert parameter.dtype == (torch.bfloat16 if narrow else torch.float32), name
    router = half.synthesis.levels[2].attentions[0].blocks[0].router
    assert router.to_logits.weight.dtype == torch.float32 and half.mapping.layers[0].weight.dtype == torch.float32


def test_bfloat16_draws_the_same_pictures_by_the_same_routes(generator):
    arguments = inputs(generator.config, 4)
    half = inference.prepare(copy.deepcopy(generator), torch.bfloat16)
    with torch.no_grad():
        exact = generator(*arguments)
        for name, router in routers(half).items():
            route = exact.routings[name].expert_index
            router.register_forward_hook(lambda _, inputs, routing, route=route: routing.sent_to(route))
        local_text = half.text_head(*arguments[1:])[1]
        with inference.autocast(half):
            rounded = half.synthesis(exact.w, local_text)
    assert rounded.image.dtype == torch.float32
    scale = exact.image.abs().max()
    assert 0 < (rounded.image - exact.image).abs().max() < 0.03 * scale
