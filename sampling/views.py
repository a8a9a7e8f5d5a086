"""Views of the latent space: pictures of prompts, interpolation between two prompts, layers with different w.

Each view is a list of frames, which `pipeline.py` draws.
"""

from typing import NamedTuple

import torch

from sampling import latent


class Frame(NamedTuple):
    """What one picture is drawn from."""

    w: torch.Tensor  # [num_layers, w_dim]
    local_text: torch.Tensor  # [T−1, text_dim]
    caption: str
    large: "Frame | None" = None  # that of the second stage, if there is one


def frames(generator, z, text, psi, captions):
    """z [B, z_dim], a Prompt of B rows, or of one for all, and B captions → B frames."""
    w = latent.codes(generator, z, text.global_text, psi)
    ws = w[:, None].expand(-1, generator.synthesis.num_layers, -1)
    local_text = text.local_text.expand(len(z), -1, -1)
    return [Frame(*frame) for frame in zip(ws, local_text, captions, strict=True)]


def samples(generator, text_encoder, prompts, num, seed, psi, numbers=None):
    """A row of `num` pictures for each prompt. z depends on the seed alone. numbers: draws only these of the `num`."""
    z, drawn = latent.noise(generator, num, seed), []
    if numbers is not None:
        z = z[numbers]
    for prompt in prompts:
        drawn += frames(generator, z, latent.read(generator, text_encoder, [prompt]), psi, [prompt] * len(z))
    return drawn


def interpolation(generator, text_encoder, prompts, seed, psi, steps):
    """From one prompt to another at the same noise."""
    amounts = torch.linspace(0, 1, steps)
    start, end = (latent.read(generator, text_encoder, [prompt]) for prompt in prompts)
    text = between_prompts(start, end, amounts)
    captions = [prompts[0], *[f"{100 * t:.0f} %" for t in amounts[1:-1]], prompts[1]]
    return frames(generator, latent.noise(generator, 1, seed).expand(steps, -1), text, psi, captions)


def between_prompts(start, end, amounts, part="both"):
    """Two Prompts of one row → a Prompt of a row for each amount in [0, 1].

    part: "global" or "local" if only that text changes, else "both".
    """
    texts = {}
    for name, a, b in zip(latent.Prompt._fields, start, end, strict=True):
        moves = part == "both" or name.startswith(part)
        texts[name] = torch.cat([between(a, b, amount if moves else 0) for amount in amounts])
    return latent.Prompt(**texts)


def mix(first, second, layers):
    """The first Frame, with the w of the second in these layers, which are numbered through both stages."""
    own = len(first.w)
    chosen = [i for i in layers if i < own]
    w = first.w.clone()
    w[chosen] = second.w[chosen]
    large = first.large and mix(first.large, second.large, [i - own for i in layers if i >= own])
    return first._replace(w=w, large=large)


def layer_names(pipe):
    """The name of each layer that has a w of its own, through all stages of a Pipeline."""
    names = []
    for stage in pipe.stages:
        for level in stage.synthesis.levels:
            side = f"{level.resolution}×{level.resolution}"
            for i in range(len(level.blocks)):
                names.append(f"{side} block {i}")
                if level.attentions:
                    names.append(f"{side} attention {i}")
    return names


def between(a, b, amount):
    """From a to b along the last axis: interpolates direction and length, so that z keeps the length of noise."""
    lengths = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    cosine = ((a * b).sum(-1, keepdim=True) / (lengths[0] * lengths[1])).clamp(-1, 1)
    angle = cosine.acos().clamp(1e-4, torch.pi - 1e-4)
    arc = ((1 - amount) * angle).sin() * a / lengths[0] + (amount * angle).sin() * b / lengths[1]
    return arc / angle.sin() * torch.lerp(*lengths, float(amount))
