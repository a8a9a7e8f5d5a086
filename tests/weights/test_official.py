"""Our generator compared with outputs of the authors' code, and the reading of their checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch

from aurora import Generator
from losses import moe_loss
from presets import PRESETS
from sampling.inference import prepare
from weights.official import load_official, renamed, reshaped

FIXTURES = sorted(Path(__file__).parent.parent.glob("fixtures/official_*.npz"))


def read(path):
    """→ the authors' generator state, and its inputs and outputs."""
    arrays = dict(np.load(path))
    return tuple(
        {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}
        for prefix in ("state/", "io/")
    )


def load_renamed(network, state, renames):
    """Puts other authors' tensors into a network → it, in eval mode; for the tests of the baselines."""
    network.load_state_dict(reshaped(renamed(state, renames), network))
    return network.eval()


@pytest.mark.parametrize("ready", [lambda generator: generator, prepare], ids=["as loaded", "ready to sample"])
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_outputs_are_the_authors(path, ready):
    """Theirs were computed one sample at a time; ours in one batch."""
    state, io = read(path)
    generator = ready(load_official(state))
    with torch.no_grad():
        output = generator(*(torch.from_numpy(io[name]) for name in ("z", "tokens", "eot")))
    np.testing.assert_allclose(output.w, io["w"], rtol=0, atol=1e-5)
    assert len(output.pyramid) == sum(name.startswith("img_res") for name in io)
    for resolution, image in output.pyramid.items():
        np.testing.assert_allclose(image, io[f"img_res_{resolution}x{resolution}"], rtol=0, atol=1e-4)
    assert output.image is output.pyramid[max(output.pyramid)]
    assert moe_loss(output, 0.001).item() == pytest.approx(io["moe_loss"].mean(), abs=1e-5)


def test_an_image_does_not_depend_on_the_rest_of_its_batch():
    state, io = read(FIXTURES[0])
    generator, inputs = load_official(state), [torch.from_numpy(io[name]) for name in ("z", "tokens", "eot")]
    with torch.no_grad():
        together, alone = generator(*inputs).image[:1], generator(*(x[:1] for x in inputs)).image
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_the_release_has_its_number_of_parameters():
    """A state dict with the release's names and shapes, without memory behind it."""
    with torch.device("meta"):
        preset = Generator(PRESETS["aurora-64"].generator)
    assert sum(p.numel() for p in preset.parameters()) == 1_166_329_387
    loaded = load_official(released_shapes())
    assert sum(p.numel() for p in loaded.parameters()) == 1_166_329_387
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in preset.named_parameters()}
    assert loaded.config.levels == preset.config.levels


def released_shapes():
    """Zero-stride tensors with the authors' names and, from the paper, the release's sizes."""
    state = {}

    def put(name, *shape):
        state[name] = torch.zeros(1).expand(shape)

    def dense(name, outputs, inputs, bias=True):
        put(f"{name}.weight", outputs, inputs)
        if bias:
            put(f"{name}.bias", outputs)

    def modulated(name, kernels, outputs, inputs, size, mtm=False, upsample=False):
        put(f"{name}.weight", kernels, outputs, inputs, size, size)
        put(f"{name}.bias", outputs)
        dense(f"{name}.style", inputs, 1024)
        if kernels > 1:
            dense(f"{name}.filter_weight", kernels, 1024)
        if upsample:
            put(f"{name}.filter", 4, 4)
        if mtm:
            put(f"{name}.mtm_weight", 27, inputs, 3, 3)
            put(f"{name}.mtm_bias", 1, 27, 1, 1)
            put(f"{name}.mtm_scales", 1, 27, 1, 1)
            dense(f"{name}.mtm_style", inputs, 1024)

    def norm(name, channels):
        put(f"{name}.weight", channels)
        put(f"{name}.bias", channels)

    put("w_avg", 1024)
    dense("text_head.align_dim", 1024, 768)
    for i in range(4):
        block = f"text_head.transformer.res_blocks.{i}"
        dense(f"{block}.attn.to_qkv", 3072, 1024)
        dense(f"{block}.attn.to_out.0", 1024, 1024)
        norm(f"{block}.ln_1", 1024)
        norm(f"{block}.ln_2", 1024)
        for alias in ("", ".mlp"):
            dense(f"{block}{alias}.c_fc", 4096, 1024)
            dense(f"{block}{alias}.c_proj", 1024, 4096)
        dense(f"mapping.dense{i}", 1024, 1152 if i == 0 else 1024)
    put("synthesis.filter", 4, 4)
    put("synthesis.net.0.0.weight", 1600, 1600)
    put("synthesis.net.0.0.transform", 3, 3)
    put("synthesis.net.0.0.freqs", 1600, 2)
    put("synthesis.net.0.0.phases", 1600)
    dense("synthesis.net.0.0.affine", 4, 1024)
    layer, inputs = 0, 1600
    blocks, depths = {4: 3, 8: 3, 16: 3, 32: 2, 64: 2}, {8: 2, 16: 2, 32: 2, 64: 1}
    kernels, experts = {4: 1, 8: 1, 16: 2, 32: 4, 64: 8}, {8: 4, 16: 8, 32: 16, 64: 16}
    for res, num_blocks in blocks.items():
        channels = min(16384 // res, 1600)
        for i in range(num_blocks):
            net, first = f"synthesis.net.{layer}.0", i == 0
            if res == 4 and first:
                modulated("synthesis.net.0.1", 1, channels, inputs, 3, mtm=True)
            else:
                modulated(f"{net}.conv1", kernels[res], channels, inputs, 3, upsample=first)
                modulated(f"{net}.conv2", kernels[res], channels, channels, 3, mtm=res < 32)
                if first:
                    put(f"{net}.skip_connection.weight", channels, inputs, 1, 1)
                    put(f"{net}.skip_connection.filter", 4, 4)
            layer, inputs = layer + 1, channels
            if res == 4:
                continue
            net = f"synthesis.net.{layer}.0"
            norm(f"{net}.norm", channels)
            put(f"{net}.proj_in.weight", 512, channels, 1, 1)
            put(f"{net}.proj_out.weight", channels, 512, 1, 1)
            for depth in range(depths[res]):
                inner = f"{net}.attn_blocks.{depth}"
                for n in (1, 2, 3):
                    norm(f"{inner}.norm{n}", 512)
                dense(f"{inner}.self_attn.to_qk", 1024, 512, bias=False)
                dense(f"{inner}.self_attn.to_v", 512, 512, bias=False)
                modulated(f"{inner}.self_attn.proj_out", 1, 512, 512, 1)
                dense(f"{inner}.cross_attn.to_q", 512, 512, bias=False)
                dense(f"{inner}.cross_attn.to_kv", 1024, 1024, bias=False)
                dense(f"{inner}.cross_attn.proj_out.0", 512, 512)
                modulated(f"{inner}.ff.routing", 1, experts[res], 512, 1)
                for e in range(experts[res]):
                    dense(f"{inner}.ff.net.{e}.0.proj", 4096, 512)
                    dense(f"{inner}.ff.net.{e}.2", 512, 2048)
            layer += 1
        modulated(f"synthesis.output_res_{res}x{res}", kernels[res], 3, channels, 1)
    return state


def test_every_form_of_the_checkpoint_loads():
    """The whole dict, of which the moving average is used; one without it; and a bare generator."""
    state, _ = read(FIXTURES[0])
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    other = {name: torch.zeros_like(value) for name, value in tensors.items()}
    expected = load_official(state).state_dict()
    for source in ({"generator": other, "generator_smooth": tensors, "iteration": 7}, {"generator": tensors}, tensors):
        torch.testing.assert_close(load_official(source).state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("damage", ["missing", "misshapen", "foreign"])
def test_other_states_are_refused_in_one_line(damage):
    state, _ = read(FIXTURES[0])
    if damage == "missing":
        del state["synthesis.net.3.0.proj_in.weight"]
    elif damage == "misshapen":
        state["mapping.dense1.weight"] = state["mapping.dense1.weight"][:-1]
    else:
        state = {"conv1.weight": np.zeros((3, 3))}
    with pytest.raises(ValueError, match=r"authors' (generator|state of Aurora)") as caught:
        load_official(state)
    assert "\n" not in str(caught.value)
