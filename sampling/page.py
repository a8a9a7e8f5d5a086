"""The requests of explore.py's page, and the answers. Each request has all settings of a set of pictures, so the server
keeps no state between requests except caches.
"""

import base64
import functools
import io
import json
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from sampling import latent, pipeline, views
from sampling.pipeline import routers

MOST = latent.BATCH  # pictures of a request: one batch, whose points `pipeline.forced` numbers


class Forced(NamedTuple):
    """Feature points that go to one expert instead of the router's choice."""

    router: str  # "resolution.block.depth"
    points: tuple[tuple[int, int], ...]  # picture, and index in N
    expert: int


@dataclass(frozen=True)
class Settings:
    """`num` pictures of a prompt, by default those of Pipeline.sample."""

    prompt: str
    seed: int = 0
    num: int = 4  # at most MOST
    psi: float = 1.0
    second: str = ""  # another prompt
    amount: float = 0.0  # of interpolation: 0 is the prompt, 1 the second one
    part: str = "both"  # of the text that is interpolated: both, global or local
    layers: tuple[int, ...] = ()  # that use the w of the second prompt, numbered through both stages
    walk: float = 0.0  # from the noise of `seed` to that of the following seeds
    forced: Forced | None = None


def read_settings(text):
    """JSON → Settings."""
    fields = json.loads(text)
    fields["layers"] = tuple(fields["layers"])
    if forced := fields["forced"]:
        points = tuple(map(tuple, forced["points"]))
        fields["forced"] = Forced(forced["router"], points, forced["expert"])
    return Settings(**fields)


@functools.lru_cache(maxsize=8)
def read(generator, text_encoder, prompt):
    """A text → latent.Prompt. Cached, because most requests change no prompt."""
    return latent.read(generator, text_encoder, [prompt])


def noise(generator, settings):
    """Settings → z [num, z_dim]."""
    steps, rest = divmod(settings.walk, 1)
    z, ahead = (latent.noise(generator, settings.num, settings.seed + int(steps) + i) for i in (0, 1))
    if rest:
        z = views.between(z, ahead, rest)
    return z


def frames_of_stage(generator, text_encoder, settings):
    """The frames of one stage, all layers with the same w."""
    text = read(generator, text_encoder, settings.prompt)
    if settings.amount:
        second = read(generator, text_encoder, settings.second or settings.prompt)
        text = views.between_prompts(text, second, [settings.amount], settings.part)
    captions = [settings.prompt] * settings.num
    return views.frames(generator, noise(generator, settings), text, settings.psi, captions)


@torch.no_grad()
def frames(pipe, settings):
    """A Pipeline and Settings → a views.Frame for each picture, of both stages."""
    drawn = pipe.view(frames_of_stage, settings)
    if not settings.layers:
        return drawn
    of_second = replace(settings, prompt=settings.second or settings.prompt, amount=0.0)
    pairs = zip(drawn, pipe.view(frames_of_stage, of_second), strict=True)
    return [views.mix(first, second, settings.layers) for first, second in pairs]


@functools.lru_cache(maxsize=1)
def draw(pipe, settings):
    """A Pipeline and Settings → Drawn, by the first stage alone, and its frames. Raises UserError."""
    todo, generator = frames(pipe, settings), pipe.generator
    if settings.forced is None:
        return pipeline.draw(generator, todo), todo
    with pipeline.forced(generator, *settings.forced):
        return pipeline.draw(generator, todo), todo


@functools.lru_cache(maxsize=MOST)
def draw_large(pipe, settings, number):
    """One picture of `draw`, by the second stage → PIL image."""
    drawn, todo = draw(pipe, settings)
    return pipeline.enlarge(pipe.upsampler, drawn.images[number : number + 1], [todo[number].large]).pictures[0]


def data_url(picture):
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def contents(pipe):
    """What the page offers to choose from, as values of JSON."""
    has_second = pipe.upsampler is not None
    return {"layers": views.layer_names(pipe), "routers": list(routers(pipe.generator)), "second_stage": has_second}


def answer(pipe, settings, router):
    """→ what the page shows, as values of JSON. router: the one whose choices it shows, or ""."""
    drawn, _ = draw(pipe, settings)
    prompts = [settings.prompt, settings.second] if settings.second else [settings.prompt]
    notes = [note for prompt in prompts for note in latent.notes(pipe.text_encoder, prompt)]
    result = {"pictures": [data_url(picture) for picture in drawn.pictures], "note": " ".join(notes)}
    if router in drawn.routings:
        routing = drawn.routings[router]
        probabilities = routing.logits.float().softmax(-1).tolist()
        result["routing"] = {"experts": routing.expert_index.tolist(), "probabilities": probabilities}
    return result
