"""What can be looked at in a latent space: seeds, truncations, the way from one prompt to another, layers, a walk.

Each view is a list of frames; sample.py draws them side by side, or one after another.
"""

from typing import NamedTuple

import torch

from sampling import latent

SWEEP = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # truncations


class Frame(NamedTuple):
    """One picture to be drawn."""

    w: torch.Tensor  # [num_layers, w_dim]
    local_text: torch.Tensor  # [T−1, text_dim]
    caption: str
    large: "Frame | None" = None  # the same for the second stage, where there is one


def of_both_stages(view, generator, upsampler, *arguments):
    """The frames of a view, with those of the second stage in them: its own w and text, from the same z and prompts."""
    drawn = view(generator, *arguments)
    if upsampler is None:
        return drawn
    return [frame._replace(large=large) for frame, large in zip(drawn, view(upsampler, *arguments), strict=True)]


def frames(generator, z, text, psi, captions):
    """z [B, z_dim] and as many prompts (a Prompt of one row serves all) → a Frame for each caption."""
    w = latent.codes(generator, z, text.global_text, psi)
    ws = w[:, None].expand(-1, generator.synthesis.num_layers, -1)
    local_text = text.local_text.expand(len(z), -1, -1)
    return [Frame(*frame) for frame in zip(ws, local_text, captions, strict=True)]


def samples(generator, clip, prompts, num, seed, psi, numbers=None):
    """A row for each prompt: `num` pictures whose latents depend on the seed alone, or those of some numbers."""
    z, rows = latent.noise(generator, num, seed), []
    if numbers is not None:
        z = z[numbers]
    for prompt in prompts:
        rows += frames(generator, z, latent.read(generator, clip, [prompt]), psi, [prompt] * len(z))
    return rows


def seeds_by_prompts(generator, clip, prompts, seeds, psi):
    """A row for each prompt, a column for each seed."""
    z = torch.cat([latent.noise(generator, 1, seed) for seed in seeds])
    rows = []
    for prompt in prompts:
        captions = [f"seed {seed}: {prompt}" for seed in seeds]
        rows += frames(generator, z, latent.read(generator, clip, [prompt]), psi, captions)
    return rows


def truncation_sweep(generator, clip, prompts, seed):
    """A row for each prompt, from its mean picture to all variety."""
    z, rows = latent.noise(generator, 1, seed), []
    for prompt in prompts:
        text = latent.read(generator, clip, [prompt])
        for psi in SWEEP:
            rows += frames(generator, z, text, psi, [f"psi {psi:g}: {prompt}"])
    return rows


def interpolation(generator, clip, prompts, seed, psi, steps, part, path):
    """From one prompt to another at the same noise. part: both, or the global or the local text alone."""
    amounts = torch.linspace(0, 1, steps)
    start, end = (latent.read(generator, clip, [prompt]) for prompt in prompts)
    text = on_the_way(start, end, amounts, part, path)
    captions = [prompts[0], *[f"{100 * t:.0f} %" for t in amounts[1:-1]], prompts[1]]
    return frames(generator, latent.noise(generator, 1, seed).expand(steps, -1), text, psi, captions)


def on_the_way(start, end, amounts, part, path):
    """Between two Prompts of one row, a row for each amount. part: both, or what moves, global or local; path: how."""
    texts = {}
    for name, a, b in zip(latent.Prompt._fields, start, end, strict=True):
        moves = part == "both" or name.startswith(part)
        texts[name] = torch.cat([between(a, b, amount if moves else 0, path) for amount in amounts])
    return latent.Prompt(**texts)


def latent_walk(generator, clip, prompt, seed, psi, steps, path, stops=4):
    """One prompt, along the noise of `stops` seeds and back to the first."""
    corners = torch.cat([latent.noise(generator, 1, seed + i) for i in range(stops)])
    z, captions = [], []
    for step in range(steps):
        at, amount = divmod(stops * step / steps, 1)
        start, end = corners[[int(at)]], corners[[(int(at) + 1) % stops]]
        z.append(between(start, end, amount, path))
        captions.append(f"{prompt}: from seed {seed + int(at)} to {seed + (int(at) + 1) % stops}, {100 * amount:.0f} %")
    return frames(generator, torch.cat(z), latent.read(generator, clip, [prompt]), psi, captions)


def layer_mixing(generator, upsampler, clip, coarse, fine, seed, psi):
    """The first k layers take their w from one prompt and the rest from another; attention reads the first one's text.

    k goes from all layers to none, those of the second stage being the last.
    """
    names = layer_names(generator) + (layer_names(upsampler) if upsampler else [])
    first, second = of_both_stages(samples, generator, upsampler, clip, [coarse, fine], 1, seed, psi)
    mixed = []
    for k in range(len(names), -1, -1):
        caption = "all layers by the first prompt" if k == len(names) else f"by the second: from {names[k]} on"
        frame = mix(first, second, k)._replace(caption=caption)
        if upsampler:
            frame = frame._replace(large=mix(first.large, second.large, max(0, k - len(first.w))))
        mixed.append(frame)
    return mixed


def mix(first, second, k):
    """A Frame whose first k layers take w from one Frame, and the rest from another."""
    return first._replace(w=torch.cat([first.w[:k], second.w[k:]]))


def layer_names(generator):
    """What takes each w, in order, in words."""
    names = []
    for level in generator.synthesis.levels:
        for i in range(len(level.blocks)):
            names.append(f"{level.resolution}×{level.resolution} block {i}")
            if level.attentions:
                names.append(f"{level.resolution}×{level.resolution} attention {i}")
    return names


def between(a, b, amount, path):
    """From a to b along the last axis: on a straight line, or on the arc between their directions."""
    if path == "linear":
        return torch.lerp(a, b, float(amount))
    lengths = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    cosine = ((a * b).sum(-1, keepdim=True) / (lengths[0] * lengths[1])).clamp(-1, 1)
    angle = cosine.acos().clamp(1e-4, torch.pi - 1e-4)
    arc = ((1 - amount) * angle).sin() * a / lengths[0] + (amount * angle).sin() * b / lengths[1]
    return arc / angle.sin() * torch.lerp(*lengths, float(amount))
