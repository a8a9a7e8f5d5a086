"""Our generator compared with outputs of the authors' code, and the reading of their checkpoint."""

import json

import numpy as np
import pytest
import torch

from aurora import Generator
from losses import moe_loss
from presets import PRESETS, GeneratorConfig, Level
from sampling.inference import prepare
from tests import ROOT
from weights.official import load_official, renamed, reshaped

FIXTURES = ROOT / "tests/fixtures"
# Small generators of the authors' code, in the order of Level's and GeneratorConfig's fields.
CONFIGS = {
    "official_small": GeneratorConfig((
        Level(4, 32, 2, 1, 0, 0, deformable=True),
        Level(8, 32, 2, 1, 2, 2, deformable=True),
        Level(16, 32, 1, 2, 1, 4, deformable=True),
        Level(32, 32, 2, 3, 1, 3),
    ), 32, 16, 32, 3, 40, 24, 32, 2, mix_tokens=False, head_dim=4),
    "official_unequal": GeneratorConfig((
        Level(4, 64, 2, 1, 0, 0, deformable=True),
        Level(8, 64, 2, 1, 1, 3, deformable=True),
        Level(16, 32, 1, 2, 2, 5, deformable=True),
        Level(32, 16, 1, 3),
    ), 64, 12, 24, 2, 20, 16, 16, 1, mix_tokens=False, head_dim=4),
    "official_wide_text": GeneratorConfig((
        Level(4, 96, 1, 2, 0, 0, deformable=True),
        Level(8, 64, 1, 2, 0, 0, deformable=True),
        Level(16, 32, 2, 1, 1, 7, deformable=True),
    ), 96, 12, 24, 4, 28, 20, 32, 3, mix_tokens=False, head_dim=2),
}  # fmt: skip
SMALL = "official_small"


def read(name):
    """A file of FIXTURES → the authors' state, and its inputs and outputs."""
    arrays = dict(np.load(FIXTURES / f"{name}.npz"))
    state, io = (
        {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}
        for prefix in ("state/", "io/")
    )
    return state, {name: torch.from_numpy(array) for name, array in io.items()}


def load_renamed(network, state, renames):
    """Puts other authors' tensors into a network → it, in eval mode; for the tests of the baselines."""
    network.load_state_dict(reshaped(renamed(state, renames), network))
    return network.eval()


@pytest.mark.parametrize("ready", [lambda generator: generator, prepare], ids=["as loaded", "ready to sample"])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_the_authors(name, ready):
    """Theirs were computed one sample at a time; ours in one batch."""
    state, io = read(name)
    generator = ready(load_official(state, CONFIGS[name]))
    with torch.no_grad():
        output = generator(io["z"], io["tokens"], io["eot"])
    np.testing.assert_allclose(output.w, io["w"], rtol=0, atol=1e-5)
    assert len(output.pyramid) == sum(name.startswith("img_res") for name in io)
    for resolution, image in output.pyramid.items():
        np.testing.assert_allclose(image, io[f"img_res_{resolution}x{resolution}"], rtol=0, atol=1e-4)
    assert moe_loss(output, 0.001).item() == pytest.approx(io["moe_loss"].mean().item(), abs=1e-5)


def test_the_release_has_its_number_of_parameters():
    """A state dict with the release's names and shapes, both from the authors' code."""
    shapes = json.loads((FIXTURES / "release_shapes.json").read_text("utf-8"))
    loaded = load_official({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert sum(p.numel() for p in loaded.parameters()) == 1_166_329_387
    with torch.device("meta"):
        preset = Generator(PRESETS["aurora-64"].generator)
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in preset.named_parameters()}


def test_every_form_of_the_checkpoint_loads():
    """The whole dict, of which the moving average is used; one without it; and a bare generator."""
    state, _ = read(SMALL)
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    other = {name: torch.zeros_like(value) for name, value in tensors.items()}
    expected = load_official(state, CONFIGS[SMALL]).state_dict()
    for source in ({"generator": other, "generator_smooth": tensors, "iteration": 7}, {"generator": tensors}):
        torch.testing.assert_close(load_official(source, CONFIGS[SMALL]).state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("damage", ["missing", "other size", "foreign"])
def test_other_states_are_refused_in_one_line(damage):
    state, _ = read(SMALL)
    if damage == "missing":
        del state["synthesis.net.3.0.proj_in.weight"]
    elif damage == "other size":
        state["mapping.dense1.weight"] = state["mapping.dense1.weight"][:-1]
    else:
        state = {"conv1.weight": np.zeros((3, 3))}
    with pytest.raises(ValueError, match="not the authors' state of Aurora's generator") as caught:
        load_official(state, CONFIGS[SMALL])
    assert "\n" not in str(caught.value)
