"""All that decides a set of pictures, in one value: what the page of explore.py sets, and draws at every change."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sampling import latent, pipeline, views

MOST = latent.BATCH  # pictures at a time, so that forced points are those of one batch
SPREAD = 0.25  # how far from a picture those lie that are "more like this": a quarter of the way to other noise


class Forced(NamedTuple):
    """Feature points that one expert is to take, whatever the router says."""

    router: str  # "resolution.block.depth"
    points: torch.Tensor  # bool [num, N]
    expert: int


@dataclass(frozen=True, eq=False)
class Settings:
    """`num` pictures of a prompt, as Pipeline.sample draws them; all else changes them."""

    prompt: str
    seed: int = 0
    num: int = 4  # at most MOST
    psi: float = 1.0
    second: str = ""  # another prompt
    amount: float = 0.0  # the way to it: 0 is the prompt, 1 the second one
    part: str = "both"  # of the text goes that way: both, global or local
    layers: tuple[int, ...] = ()  # these take w from the second prompt, see views.layer_names
    walk: float = 0.0  # the noise's way from `seed` to the seeds after it
    centre: torch.Tensor | None = None  # z [z_dim] of the picture that all of them are to be like
    forced: Forced | None = None


@functools.lru_cache(maxsize=8)
def read(generator, clip, prompt):
    """A text → latent.Prompt. The newest are kept, as most changes leave the prompts as they are."""
    return latent.read(generator, clip, [prompt])


def codes(generator, settings):
    """Settings → z [num, z_dim]."""
    steps, rest = divmod(settings.walk, 1)
    z, ahead = (latent.noise(generator, settings.num, settings.seed + int(steps) + i) for i in (0, 1))
    if rest:
        z = views.between(z, ahead, rest, "spherical")
    if settings.centre is not None:
        near = views.between(settings.centre.expand_as(z), z, SPREAD, "spherical")
        z = torch.cat([settings.centre[None], near[1:]])
    return z


@torch.no_grad()
def frames(generator, clip, settings):
    """Settings → a views.Frame for each picture. Raises UserError where there is no prompt."""
    z, captions = codes(generator, settings), [settings.prompt] * settings.num
    first, second = (read(generator, clip, p) for p in (settings.prompt, settings.second or settings.prompt))
    text = first
    if settings.amount:
        text = views.on_the_way(first, second, [settings.amount], settings.part, "spherical")
    drawn = views.frames(generator, z, text, settings.psi, captions)
    if not settings.layers:
        return drawn
    of_second = torch.zeros(generator.synthesis.num_layers, 1, dtype=torch.bool, device=z.device)
    of_second[list(settings.layers)] = True
    others = views.frames(generator, z, second, settings.psi, captions)
    pairs = zip(drawn, others, strict=True)
    return [frame._replace(w=torch.where(of_second, other.w, frame.w)) for frame, other in pairs]


def frames_of(pipe, settings):
    """A Pipeline and Settings → a views.Frame for each picture, of both stages; `layers` counts through both."""
    own = pipe.generator.synthesis.num_layers
    of_first = dataclasses.replace(settings, layers=tuple(i for i in settings.layers if i < own))
    drawn = frames(pipe.generator, pipe.clip, of_first)
    if pipe.upsampler is None:
        return drawn
    of_second = dataclasses.replace(settings, layers=tuple(i - own for i in settings.layers if i >= own))
    large = frames(pipe.upsampler, pipe.clip, of_second)
    return [frame._replace(large=its) for frame, its in zip(drawn, large, strict=True)]


def draw(pipe, settings):
    """A Pipeline and Settings → pipeline.Drawn by both stages. Raises UserError."""
    todo = frames_of(pipe, settings)
    drawn = draw_small(pipe, settings, todo)
    return pipeline.enlarge(pipe.upsampler, drawn, todo) if pipe.upsampler else drawn


def draw_small(pipe, settings, todo):
    """The first stage's share of `draw`; todo: of frames_of."""
    if settings.forced is None:
        return pipeline.draw(pipe.generator, todo)
    router, points, expert = settings.forced
    with pipeline.forced(pipe.generator, router, points.to(pipe.generator.w_avg.device), expert):
        return pipeline.draw(pipe.generator, todo)
