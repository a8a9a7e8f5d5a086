"""The requests of explore.py's page, and the answers. Each request has all settings of a set of pictures, so the server
keeps no state between requests except caches.
"""

import base64
import contextlib
import functools
import io
import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from common.cli import UserError
from sampling import latent, pipeline, views
from sampling.pictures import in_range
from sampling.pipeline import Drawn, Pipeline, routers

MOST = latent.BATCH  # pictures of a request: one batch, whose points `pipeline.forced` numbers
MOST_PSI, MOST_SEED, MOST_TEXT = 1.5, 2**32 - 1, 1000  # the last: characters of a prompt
SPREAD = 0.25  # "More like this" moves z by this share of the way to other noise


class Forced(NamedTuple):
    """Feature points that go to one expert instead of the router's choice."""

    router: str  # "resolution.block.router"
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
    """JSON, which may contain anything → Settings within bounds. Raises any Exception for wrong fields."""
    fields = json.loads(text)
    forced = fields["forced"]
    if forced:
        points = tuple((natural(picture), natural(index)) for picture, index in forced["points"])
        forced = Forced(forced["router"], points, forced["expert"])
    return Settings(
        prompt=str(fields["prompt"])[:MOST_TEXT].strip(),
        seed=seed_of(fields["seed"]),
        num=int(within(fields["num"], 1, MOST)),
        psi=within(fields["psi"], 0, MOST_PSI),
        second=str(fields["second"])[:MOST_TEXT].strip(),
        amount=within(fields["amount"], 0, 1),
        part=fields["part"],
        layers=tuple(map(natural, fields["layers"])),
        walk=within(fields["walk"], 0, MOST_SEED),
        centre=tuple(fields["centre"]),
        forced=forced,
    )


def within(value, least, most):
    """Anything → a number within these bounds; `least` for what is not a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    return min(max(number, least), most) if math.isfinite(number) else least


def seed_of(value):
    """What was typed as the seed → int. Raises UserError: another seed would give other pictures in silence."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if 0 <= (number := float(value)) <= MOST_SEED and number == int(number):
            return int(number)
    raise UserError(f"{str(value)[:20]!r} is no seed: give a whole number from 0 to {MOST_SEED}")


def natural(index):
    """Raises UserError for a negative index, which Python would count from the end."""
    if index < 0:
        raise UserError(f"the index {index} is negative; indices are from 0 on")
    return index


# ----------------------------------------------------------------------------------------------------------------------
# From settings to pictures.


@functools.lru_cache(maxsize=8)
def read(generator, clip, prompt):
    """A text → latent.Prompt. Cached, because most requests change no prompt."""
    return latent.read(generator, clip, [prompt])


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


def frames_of_stage(generator, clip, settings, layers):
    """The frames of one stage. layers: those of this stage that use the w of the second prompt."""
    z, captions = noise(generator, settings), [settings.prompt] * settings.num
    first = text = read(generator, clip, settings.prompt)
    second = read(generator, clip, settings.second or settings.prompt)
    if settings.amount:
        text = views.between_prompts(first, second, [settings.amount], settings.part)
    drawn = views.frames(generator, z, text, settings.psi, captions)
    if not layers:
        return drawn
    of_second = torch.zeros(generator.synthesis.num_layers, 1, dtype=torch.bool, device=z.device)
    of_second[layers] = True
    others = views.frames(generator, z, second, settings.psi, captions)
    pairs = zip(drawn, others, strict=True)
    return [frame._replace(w=torch.where(of_second, other.w, frame.w)) for frame, other in pairs]


@torch.no_grad()
def frames(pipe, settings):
    """A Pipeline and Settings → a views.Frame for each picture, of both stages."""
    own = pipe.generator.synthesis.num_layers
    drawn = frames_of_stage(pipe.generator, pipe.clip, settings, [i for i in settings.layers if i < own])
    if pipe.upsampler is None:
        return drawn
    above = [i - own for i in settings.layers if i >= own]
    large = frames_of_stage(pipe.upsampler, pipe.clip, settings, above)
    return [frame._replace(large=its) for frame, its in zip(drawn, large, strict=True)]


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
    router, chosen, expert = settings.forced
    side = int(router.split(".")[0]) if router in routers(generator) else 1
    points = torch.zeros(settings.num, side**2, dtype=torch.bool)
    for picture, index in chosen:
        points[picture, index] = True
    with pipeline.forced(generator, router, points.to(generator.w_avg.device), expert):
        return pipeline.draw(generator, todo), todo


@functools.lru_cache(maxsize=MOST)
def draw_large(model, settings, number):
    """One picture of `draw`, by the second stage → PIL image. Raises UserError for a model without one."""
    if getattr(model, "upsampler", None) is None:
        raise UserError("this model has no second stage")
    drawn, todo = draw(model, settings)
    return pipeline.enlarge(model.upsampler, drawn.images[number : number + 1], [todo[number].large]).pictures[0]


# ----------------------------------------------------------------------------------------------------------------------
# Answers.


def data_url(picture):
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def answer(model, settings, router):
    """→ what the page shows, as values of JSON. router: the one whose choices it shows, or ""."""
    drawn, _ = draw(model, settings)
    is_aurora = isinstance(model, Pipeline)
    clip = model.clip if is_aurora else model.clip.text
    prompts = [settings.prompt, settings.second] if settings.second else [settings.prompt]
    notes = [note for prompt in prompts for note in latent.notes(clip, prompt)]
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
