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

from common.cli import UserError
from sampling import latent, pipeline, views
from sampling.pictures import in_range
from sampling.pipeline import Drawn, Pipeline, routers

MOST = latent.BATCH  # pictures of a request: one batch, whose points `pipeline.forced` numbers
MOST_PSI, MOST_TEXT = 1.5, 1000  # the last: characters of a prompt
SPREAD = 0.25  # "More like this" moves z by this share of the way to other noise


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
    centre: tuple[float, ...] = ()  # z of the picture that all pictures resemble
    forced: Forced | None = None


def read_settings(text):
    """JSON, which may contain anything → Settings. Raises UserError, or any Exception for wrong fields."""
    fields = json.loads(text)
    for name in ("layers", "centre"):
        fields[name] = tuple(fields[name])
    if forced := fields["forced"]:
        points = tuple(map(tuple, forced["points"]))
        fields["forced"] = Forced(forced["router"], points, forced["expert"])
    settings = Settings(**fields)
    pipeline.check_seed(settings.seed)
    if not 1 <= settings.num <= MOST or max(len(settings.prompt), len(settings.second)) > MOST_TEXT:
        raise UserError(f"ask for 1 to {MOST} pictures, and give prompts of at most {MOST_TEXT} characters")
    bounds = {"psi": MOST_PSI, "amount": 1, "walk": 2**32}
    for name, most in bounds.items():
        if not 0 <= getattr(settings, name) <= most:  # NaN is not
            raise UserError(f"{name} is not between 0 and {most}")
    points = settings.forced.points if settings.forced else ()
    if any(index < 0 for index in (*settings.layers, *sum(points, ()))):  # Python would count from the end
        raise UserError("an index is negative; indices are from 0 on")
    return settings


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
    if settings.centre:
        centre = torch.tensor([settings.centre]).to(z)
        near = views.between(centre.expand_as(z), z, SPREAD)
        z = torch.cat([centre, near[1:]])
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
def draw(model, settings):
    """A Pipeline, or a system of baselines/, and Settings → Drawn, by the first stage alone, and its frames.

    A system uses only the prompt, the seed and the number. Raises UserError.
    """
    latent.check([settings.prompt])
    if not isinstance(model, Pipeline):
        images = model.sample(model.clip.read([settings.prompt]), settings.seed, settings.num)
        return Drawn(in_range(images), [settings.prompt] * settings.num, {}), []
    todo, generator = frames(model, settings), model.generator
    if settings.forced is None:
        return pipeline.draw(generator, todo), todo
    with pipeline.forced(generator, *settings.forced):
        return pipeline.draw(generator, todo), todo


@functools.lru_cache(maxsize=MOST)
def draw_large(model, settings, number):
    """One picture of `draw`, by the second stage → PIL image. Raises UserError for a model without one."""
    if getattr(model, "upsampler", None) is None:
        raise UserError("this model has no second stage")
    drawn, todo = draw(model, settings)
    return pipeline.enlarge(model.upsampler, drawn.images[number : number + 1], [todo[number].large]).pictures[0]


def data_url(picture):
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def answer(model, settings, router):
    """→ what the page shows, as values of JSON. router: the one whose choices it shows, or ""."""
    drawn, _ = draw(model, settings)
    is_aurora = isinstance(model, Pipeline)
    text_encoder = model.text_encoder if is_aurora else model.clip.text
    prompts = [settings.prompt, settings.second] if settings.second else [settings.prompt]
    notes = [note for prompt in prompts for note in latent.notes(text_encoder, prompt)]
    result = {"pictures": [data_url(picture) for picture in drawn.pictures], "note": " ".join(notes)}
    if not is_aurora:
        return result | {"baseline": type(model).__name__, "layers": [], "routers": []}
    result["layers"] = views.layer_names(model)
    result["routers"] = list(routers(model.generator))
    result["second_stage"] = model.upsampler is not None
    result["z"] = noise(model.generator, settings).tolist()
    if router in drawn.routings:
        routing = drawn.routings[router]
        probabilities = routing.logits.float().softmax(-1).tolist()
        result["routing"] = {"experts": routing.expert_index.tolist(), "probabilities": probabilities}
    return result
