"""Views of the latent space: seeds, truncations, interpolation between prompts, mixed layers, a walk.

Each view is a list of frames, which sample.py draws as a grid or an animation.
"""

from typing import NamedTuple

import torch

from sampling import latent

SWEEP = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # truncations


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


def rows(generator, clip, prompts, z, psi, labels):
    """A row for each prompt: a Frame for each z [B, z_dim], whose caption is one of B labels and the prompt."""
    drawn = []
    for prompt in prompts:
        captions = [label + prompt for label in labels]
        drawn += frames(generator, z, latent.read(generator, clip, [prompt]), psi, captions)
    return drawn


def samples(generator, clip, prompts, num, seed, psi, numbers=None):
    """A row of `num` pictures for each prompt. z depends on the seed alone. numbers: draws only these of the `num`."""
    z = latent.noise(generator, num, seed)
    if numbers is not None:
        z = z[numbers]
    return rows(generator, clip, prompts, z, psi, [""] * len(z))


def seeds_by_prompts(generator, clip, prompts, seeds, psi):
    """A row for each prompt, a column for each seed."""
    z = torch.cat([latent.noise(generator, 1, seed) for seed in seeds])
    return rows(generator, clip, prompts, z, psi, [f"seed {seed}: " for seed in seeds])


def truncation_sweep(generator, clip, prompts, seed):
    """A row for each prompt, a column for each ψ of SWEEP."""
    z, drawn = latent.noise(generator, 1, seed), []
    for prompt in prompts:
        for psi in SWEEP:
            drawn += rows(generator, clip, [prompt], z, psi, [f"psi {psi:g}: "])
    return drawn


def interpolation(generator, clip, prompts, seed, psi, steps, part):
    """From one prompt to another at the same noise. part: see between_prompts."""
    amounts = torch.linspace(0, 1, steps)
    start, end = (latent.read(generator, clip, [prompt]) for prompt in prompts)
    text = between_prompts(start, end, amounts, part)
    captions = [prompts[0], *[f"{100 * t:.0f} %" for t in amounts[1:-1]], prompts[1]]
    return frames(generator, latent.noise(generator, 1, seed).expand(steps, -1), text, psi, captions)


def between_prompts(start, end, amounts, part):
    """Two Prompts of one row → a Prompt of a row for each amount in [0, 1].

    part: "global" or "local" if only that text changes, else "both".
    """
    texts = {}
    for name, a, b in zip(latent.Prompt._fields, start, end, strict=True):
        moves = part == "both" or name.startswith(part)
        texts[name] = torch.cat([between(a, b, amount if moves else 0) for amount in amounts])
    return latent.Prompt(**texts)


def latent_walk(generator, clip, prompt, seed, psi, steps, stops=4):
    """One prompt, from the noise of one seed to that of the next, through `stops` seeds and back to the first."""
    corners = torch.cat([latent.noise(generator, 1, seed + i) for i in range(stops)])
    z, captions = [], []
    for step in range(steps):
        at, amount = divmod(stops * step / steps, 1)
        start, end = corners[[int(at)]], corners[[(int(at) + 1) % stops]]
        z.append(between(start, end, amount))
        captions.append(f"{prompt}: from seed {seed + int(at)} to {seed + (int(at) + 1) % stops}, {100 * amount:.0f} %")
    return frames(generator, torch.cat(z), latent.read(generator, clip, [prompt]), psi, captions)


def layer_mixing(pipe, coarse, fine, seed, psi):
    """The first k layers use the w of one prompt, the others that of another. Attention reads the first prompt's text.

    pipe: a Pipeline. k decreases from all layers to none; the layers of the second stage are the last.
    """
    names = layer_names(pipe)
    first, second = pipe.frames([coarse, fine], 1, seed, psi)
    mixed = []
    for k in range(len(names), -1, -1):
        caption = "all layers: first prompt" if k == len(names) else f"second prompt: from {names[k]} on"
        mixed.append(mix(first, second, range(k, len(names)))._replace(caption=caption))
    return mixed


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
            for i in range(len(level.blocks)):
                names.append(f"{level.resolution}×{level.resolution} block {i}")
                if level.attentions:
                    names.append(f"{level.resolution}×{level.resolution} attention {i}")
    return names


def between(a, b, amount):
    """From a to b along the last axis: interpolates direction and length, so that z keeps the length of noise."""
    lengths = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    cosine = ((a * b).sum(-1, keepdim=True) / (lengths[0] * lengths[1])).clamp(-1, 1)
    angle = cosine.acos().clamp(1e-4, torch.pi - 1e-4)
    arc = ((1 - amount) * angle).sin() * a / lengths[0] + (amount * angle).sin() * b / lengths[1]
    return arc / angle.sin() * torch.lerp(*lengths, float(amount))
