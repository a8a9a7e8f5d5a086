"""Our generator compared with outputs of the authors' code, and the reading of their checkpoint."""

import json
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


def test_the_release_has_its_number_of_parameters():
    """A state dict with the authors' names and, from the paper, the release's shapes; without memory behind it."""
    shapes = json.loads((FIXTURES[0].parent / "release_shapes.json").read_text("utf-8"))
    loaded = load_official({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()})
    with torch.device("meta"):
        preset = Generator(PRESETS["aurora-64"].generator)
    assert sum(p.numel() for p in loaded.parameters()) == 1_166_329_387
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in preset.named_parameters()}
    assert loaded.config.levels == preset.config.levels


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
