"""Aurora from Python: load a model, draw pictures, and see which experts drew them. The commands use it too.

from sampling.pipeline import Pipeline
pipe = Pipeline.load("models/emoji.safetensors")
pictures = pipe.sample("red heart", num=4, seed=0)
"""

import contextlib
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import trange

from common import distributed
from common.cli import UserError
from router import Routing
from sampling import inference, latent, views
from sampling.pictures import at_own_size, in_range
from weights.generator_file import DEMO, load_generator, load_upsampler, upsampler_of

LARGE = ", large"  # suffix of the second stage's router names, some of which the first stage has too


@dataclass
class Drawn:
    """Pictures, their captions, and which expert took which feature point."""

    images: torch.Tensor  # [n, 3, R, R] in [−1, 1]
    captions: list[str]
    routings: dict[str, Routing]  # of each router "resolution.block.depth", with LARGE if of the second stage

    @property
    def pictures(self) -> list[Image.Image]:
        """PIL images at their own resolution."""
        return [at_own_size(image) for image in self.images]


class Pipeline:
    """A generator and its text encoder, ready to draw; with an upsampler, the second stage enlarges the pictures.

    On one machine the same prompts, seed and psi give bit-identical pictures. psi: the truncation; 1 is all variety, 0
    each prompt's mean picture. Methods raise UserError for prompts that cannot be drawn.
    """

    def __init__(self, generator: torch.nn.Module, text_encoder: torch.nn.Module, upsampler=None):
        self.generator, self.text_encoder, self.upsampler = generator, text_encoder, upsampler

    @classmethod
    def load(
        cls,
        checkpoint: str | Path = DEMO,
        device="auto",
        dtype="auto",
        clip: str | None = None,
        upsampler: str | Path | None = None,
        resolution: int | None = None,
    ):
        """A generator_ema.safetensors of a run, or the authors' aurora_v1.pth → Pipeline. Raises UserError.

        dtype: "fp32", "bf16", or "auto", see inference.sampling_dtype. clip: MODEL:WEIGHTS of open_clip, instead of the
        one that the file names. upsampler: the file of a second stage, by default what upsampler_of finds. resolution:
        of the pictures, by default the highest; the second stage is not used for resolutions of the first.
        """
        device = distributed.start(str(device))
        generator, text_encoder, _ = load_generator(Path(checkpoint), device, clip)
        path = upsampler_of(checkpoint) if upsampler is None else upsampler
        upsampler = None if path is None else load_upsampler(path, text_encoder, device)
        if resolution is not None:
            generator, upsampler = up_to(resolution, generator, upsampler)
        pipe = cls(generator, text_encoder, upsampler)
        for stage in pipe.stages:
            inference.prepare(stage, inference.sampling_dtype(dtype, stage))
        return pipe

    @property
    def stages(self) -> list[torch.nn.Module]:
        return [self.generator, self.upsampler] if self.upsampler else [self.generator]

    @property
    def resolution(self) -> int:
        return self.stages[-1].config.resolutions[-1]

    def sample(self, prompts: str | list[str], num=1, seed=0, psi=1.0) -> list[Image.Image]:
        """`num` PIL images of each prompt, one prompt after another. The noise depends on the seed alone."""
        return self.experts(prompts, num, seed, psi).pictures

    @torch.no_grad()
    def frames(self, prompts: str | Iterable[str], num=1, seed=0, psi=1.0, numbers=None) -> list[views.Frame]:
        """What `sample` draws, so that w can be changed before `draw`. numbers: only these of the `num`."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        latent.check(prompts)
        if num < 1:
            raise UserError(f"num={num}: give 1 or more")
        return self.view(views.samples, prompts, num, int(seed), psi, numbers)

    def view(self, view, *arguments) -> list[views.Frame]:
        """The frames of a function(generator, text_encoder, *arguments) of views.py: both stages, from the same z."""
        frames = view(self.generator, self.text_encoder, *arguments)
        if self.upsampler is None:
            return frames
        larger = view(self.upsampler, self.text_encoder, *arguments)
        return [frame._replace(large=large) for frame, large in zip(frames, larger, strict=True)]

    def experts(self, prompts: str | list[str], num=1, seed=0, psi=1.0) -> Drawn:
        """Like `sample`, → Drawn, whose `routings` have the expert of each feature point and its probabilities."""
        return self.draw(self.frames(prompts, num, seed, psi))

    def draw(self, frames: list[views.Frame]) -> Drawn:
        """Frames → Drawn, by both stages if there are two."""
        drawn = draw(self.generator, frames)
        if self.upsampler is None:
            return drawn
        large = enlarge(self.upsampler, drawn.images, [frame.large for frame in frames])
        routings = {name + LARGE: routing for name, routing in large.routings.items()}
        return Drawn(large.images, drawn.captions, drawn.routings | routings)

    @torch.no_grad()
    def enlarge(self, image: torch.Tensor, caption: str, seed=0) -> Image.Image:
        """An image [3, R, R] in [−1, 1] of the second stage's input resolution, and its caption → a PIL image."""
        if self.upsampler is None:
            raise UserError("this model has no second stage; give an upsampler")
        latent.check([caption])
        frames = views.samples(self.upsampler, self.text_encoder, [caption], 1, seed, 1.0)
        return enlarge(self.upsampler, image[None].to(frames[0].w.device), frames).pictures[0]


def up_to(resolution, generator, upsampler):
    """Both stages without the levels above a resolution; no second stage if the first has it. Raises UserError."""
    known = [*generator.config.resolutions, *(upsampler.config.resolutions if upsampler else ())]
    if resolution not in known:
        why = "" if upsampler else "; for larger ones name an upsampler with --upsampler"
        raise UserError(f"--resolution {resolution!r}: choose one of {', '.join(map(str, known))}{why}")
    if resolution in generator.config.resolutions:
        upsampler = None
    stage = upsampler or generator
    levels = tuple(level for level in stage.config.levels if level.resolution <= resolution)
    stage.config = dataclasses.replace(stage.config, levels=levels)
    stage.synthesis.levels = stage.synthesis.levels[: len(levels)]
    return generator, upsampler


@torch.no_grad()
def enlarge(upsampler, images, frames):
    """Images of the first stage, and a frame of the second for each → Drawn."""
    return draw(upsampler, frames, latent.inputs(upsampler, images))


@torch.no_grad()
def draw(generator, frames, given=()):
    """Frames → Drawn, by one stage, in batches. given: for an Upsampler, its inputs from upsampler.given_images."""
    w = torch.stack([frame.w for frame in frames])
    local_text = torch.stack([frame.local_text for frame in frames])
    outputs = []
    with inference.autocast(generator):
        for first in trange(0, len(frames), latent.BATCH, disable=len(frames) <= latent.BATCH, leave=False):
            part = slice(first, first + latent.BATCH)
            outputs.append(generator.synthesis(*(images[part] for images in given), w[part], local_text[part]))
    images = in_range(torch.cat([output.image for output in outputs]))
    routings = {
        name: Routing(*map(torch.cat, zip(*(output.routings[name] for output in outputs), strict=True)))
        for name in outputs[0].routings
    }
    return Drawn(images, [frame.caption for frame in frames], routings)


def routers(generator):
    """{name in Output.routings: router} of a generator."""
    return {
        f"{level.resolution}.{i}.{depth}": block.router
        for level in generator.synthesis.levels
        for i, attention in enumerate(level.attentions)
        for depth, block in enumerate(attention.blocks)
    }


@contextlib.contextmanager
def forced(generator, name, points, expert):
    """A context in which a router sends points, pairs (picture, index in N), to one expert. Raises UserError."""
    if name not in (known := routers(generator)):
        raise UserError(f"there is no router {name}; choose one of {', '.join(known) or 'none'}")
    count = len(known[name].to_logits.weight)
    if not 0 <= expert < count:
        raise UserError(f"there is no expert {expert}; router {name} has {count}")

    def redirect(_, inputs, routing):
        expert_index = routing.expert_index.clone()
        pictures, places = torch.tensor(points).T
        expert_index[pictures, places] = expert
        return routing.sent_to(expert_index)

    handle = known[name].register_forward_hook(redirect)
    try:
        yield
    finally:
        handle.remove()
