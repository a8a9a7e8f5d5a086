"""The baselines learn and draw on another device than the CPU: they mix no devices, and the host waits for no result.

That device is meta, whose tensors have no content. To mix it with the CPU raises, and so does to ask for a value.
"""

import contextlib
import copy

import pytest
import torch

from baselines import muse
from baselines.ladagan import LadaGAN
from baselines.muse import Muse
from baselines.stylegan_t import StyleGANT
from clip import MiniLM, Text, load_clip

META = torch.device("meta")


def read(encoder, captions):
    """In the place of MiniLM, which asks how long the captions are."""
    tokens = torch.empty(len(captions), encoder.context_length, encoder.width, device=META)
    return Text(tokens, torch.zeros(len(captions), dtype=torch.long, device=META), tokens[:, 0])


@pytest.mark.parametrize("system_class", [StyleGANT, LadaGAN, Muse])
def test_steps_and_samples_stay_on_their_device(system_class, monkeypatch):
    clip = copy.deepcopy(load_clip("emoji")).to(META)  # a copy, as all share its text encoder
    monkeypatch.setattr(MiniLM, "read", read)
    monkeypatch.setitem(muse.ADAM, "fused", False)  # meta has neither
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    system, text = system_class(clip, 32, META), clip.read(["a red circle", "two blue squares"])
    images = torch.empty(2, 3, 32, 32, device=META)
    with pytest.raises(RuntimeError):
        images.sum().item()
    for number in (0, 10**6):  # Muse's VQGAN learns first
        report = system.step(number, images, text, torch.Generator().manual_seed(0))
        assert {value.device for value in report.values()} == {META}
    assert system.sample(text, seed=0, count=1).device == META
