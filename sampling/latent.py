"""From prompts and noise to w: what sampling and evaluation share."""

from typing import NamedTuple

import torch

from common.cli import UserError
from data.pairs import shows_something
from upsampler import draw_input_noise, given_images

NUM_MEAN = 256  # z from which a prompt's mean w is computed
BATCH = 16  # pictures drawn at a time


class Prompt(NamedTuple):
    """The text head's output for B prompts."""

    global_text: torch.Tensor  # [B, text_dim]
    local_text: torch.Tensor  # [B, T−1, text_dim]


def check(prompts):
    """Raises UserError for no prompts, an empty one, or one that is not UTF-8."""
    if not prompts:
        raise UserError('nothing to draw; give one or more prompts, for example "red heart"')
    for prompt in prompts:
        if not shows_something(prompt):
            raise UserError("a prompt is empty; say what to draw")
        if "\0" in prompt or prompt != prompt.encode("utf-8", "replace").decode():
            raise UserError("a prompt is not UTF-8 text, or contains a NUL character; remove its special characters")


def read(generator, text_encoder, prompts):
    """A list of texts → Prompt. Raises UserError, see `check`."""
    check(prompts)
    text = text_encoder.read(prompts)
    return Prompt(*generator.text_head(text.tokens, text.eot))


def notes(text_encoder, prompt):
    """Yields sentences about the parts of a prompt that the text encoder does not read."""
    shown = prompt if len(prompt) <= 60 else prompt[:60] + "…"
    if cut := text_encoder.num_tokens_cut(prompt):
        yield f'"{shown}" is {cut} tokens too long for this text encoder, which ignores its end.'
    if unknown := text_encoder.unknown(prompt):
        yield f'In "{shown}" this text encoder does not know {" ".join(unknown)[:60]}; use English words.'


def unread(text, captions):
    """A sentence about the captions of a data set that the text encoder cannot read whole; "" if it reads all."""
    partly = [caption for caption in captions if text.unknown(caption) or text.num_tokens_cut(caption)]
    if not partly:
        return ""
    found = f"{len(partly)} of {len(captions)} captions, such as “{partly[0][:60]}”"
    return f"note: the text encoder reads only parts of {found}: they are too long, or have words that it does not know"


def print_notes(text_encoder, prompts):
    """Prints what the text encoder does not read of the prompts."""
    for prompt in prompts:
        for note in notes(text_encoder, prompt):
            print(f"note: {note}")


def noise(generator, count, seed):
    """z [count, z_dim] ~ N(0, 1), the same on any device."""
    z = torch.randn(count, generator.config.z_dim, generator=torch.Generator().manual_seed(seed))
    return z.to(generator.w_avg.device)


def inputs(upsampler, images):
    """The inputs of an upsampler for images of the first stage, see upsampler.given_images.

    All images get the same noise. Otherwise walks would flicker.
    """
    noise = draw_input_noise(upsampler.config, 1, torch.Generator().manual_seed(0))
    return given_images(upsampler.config, images, noise.expand(len(images), -1, -1, -1))


def mean_code(generator, global_text):
    """The mean w of each prompt over NUM_MEAN z, [B, w_dim]."""
    z = noise(generator, NUM_MEAN, seed=0)
    codes = generator.mapping(z.repeat(len(global_text), 1), global_text.repeat_interleave(NUM_MEAN, 0))
    return codes.unflatten(0, (-1, NUM_MEAN)).mean(1)


def codes(generator, z, global_text, psi):
    """z [B, z_dim] and the global text of as many prompts, or of one for all → w [B, w_dim] at truncation ψ.

    w̄_c + ψ(w − w̄_c), toward the prompt's own mean w̄_c. Toward the mean of all prompts the effect of the text would
    fade together with that of the noise.
    """
    w = generator.mapping(z, global_text.expand(len(z), -1))
    if psi == 1:
        return w
    mean = mean_code(generator, global_text)
    return mean + psi * (w - mean)


@torch.no_grad()
def generate(generator, text_encoder, captions, z, resolution=None, psi=1.0, batch=64, given=()):
    """Yields the generator's Output for each batch of N captions and their z [N, z_dim].

    resolution: where to stop, by default the highest. psi: the truncation; 1 is none. given: for an Upsampler, its
    inputs from upsampler.given_images.
    """
    for first in range(0, len(captions), batch):
        part, device = slice(first, first + batch), generator.w_avg.device
        prompt = read(generator, text_encoder, captions[part])
        w = codes(generator, z[part].to(device), prompt.global_text, psi)
        yield generator.synthesis(*(images[part].to(device) for images in given), w, prompt.local_text, resolution)
