"""Aurora from Python: load a model, sample, interpolate, and look at its experts. The commands draw through it, too.

from sampling.pipeline import Pipeline
pipe = Pipeline.load("models/emoji.safetensors")
pictures = pipe.sample("red heart", num=4, seed=0)
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from common import distributed
from common.cli import UserError
from router import Routing
from sampling import inference, latent, views
from weights.checkpoint import DEMO, load_generator


@dataclass
class Drawn:
    """Pictures, how they were captioned, and which expert took which feature point."""

    images: torch.Tensor  # [n, 3, R, R] in [−1, 1]
    captions: list[str]
    routings: dict[str, Routing]  # of every router, by "resolution.block.depth"

    @property
    def pictures(self) -> list[Image.Image]:
        """The images as PIL has them, at their own resolution."""
        pixels = ((self.images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(picture) for picture in pixels]


class Pipeline:
    """A generator and the text encoder that reads its prompts, ready to draw.

    The same prompts, seed and psi give the same pictures, to the bit on one machine. psi: the truncation; 1 is all
    variety, 0 each prompt's mean picture. Methods raise UserError where an argument cannot be.
    """

    def __init__(self, generator: torch.nn.Module, clip: torch.nn.Module, notes: dict):
        self.generator, self.clip, self.notes = generator, clip, notes

    @classmethod
    def load(cls, checkpoint: str | Path = DEMO, device="auto", dtype="auto", clip: str | None = None, compiled=False):
        """A generator_ema.safetensors of a run, or the authors' aurora_v1.pth → Pipeline. Raises UserError.

        dtype: "fp32", "bf16", or "auto", see inference.sampling_dtype. clip: MODEL:WEIGHTS of open_clip, in the place
        of what the file names.
        """
        generator, clip, notes = load_generator(Path(checkpoint), distributed.start(device), clip)
        inference.prepare(generator, inference.sampling_dtype(dtype, generator), compiled)
        return cls(generator, clip, notes)

    @property
    def resolution(self) -> int:
        return self.generator.synthesis.levels[-1].resolution

    @torch.no_grad()
    def sample(self, prompts: str | list[str], num=1, seed=0, psi=1.0) -> list[Image.Image]:
        """`num` PIL pictures of each prompt, one prompt after the other. The noise depends on the seed alone."""
        return self.draw(self.frames(prompts, num, seed, psi)).pictures

    @torch.no_grad()
    def frames(self, prompts: str | list[str], num=1, seed=0, psi=1.0, numbers=None) -> list[views.Frame]:
        """The latent codes of `sample`, to be changed before they are drawn. numbers: only these of the `num`."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        latent.check(prompts)
        check_whole(num=(num, 1), seed=(seed, 0))
        return views.samples(self.generator, self.clip, prompts, num, seed, psi, numbers)

    @torch.no_grad()
    def interpolate(self, start: str, end: str, steps=8, seed=0, psi=1.0, part="both", path="spherical"):
        """PIL pictures on the way from one prompt to another. part, path: see views.interpolation."""
        prompts = start, end
        check_whole(steps=(steps, 2), seed=(seed, 0))
        frames = views.interpolation(self.generator, self.clip, prompts, seed, psi, steps, part, path)
        return self.draw(frames).pictures

    @torch.no_grad()
    def experts(self, prompts: str | list[str], num=1, seed=0, psi=1.0) -> Drawn:
        """As `sample`, → Drawn, whose `routings` say which expert took each feature point, and how surely."""
        return self.draw(self.frames(prompts, num, seed, psi))

    def draw(self, frames: list[views.Frame]) -> Drawn:
        """Frames of views.py → Drawn."""
        return draw(self.generator, frames)


def check_whole(**arguments):
    """Raises UserError where an argument, name=(value, least), is no whole number, or less than the least."""
    for name, (value, least) in arguments.items():
        if not isinstance(value, int) or not least <= value < 2**63:
            raise UserError(f"{name}={value!r}: give a whole number, {least} or more")


@torch.no_grad()
def draw(generator, frames):
    """Frames → Drawn, in batches of latent.BATCH."""
    w, local_text = (torch.stack(t) for t in list(zip(*frames, strict=True))[:2])
    parts = len(range(0, len(frames), latent.BATCH))
    with inference.compiling():
        outputs = list(tqdm(latent.outputs(generator, w, local_text), total=parts, disable=parts < 2, leave=False))
    images = torch.cat([output.image for output in outputs]).clamp(-1, 1)
    routings = {
        name: Routing(*map(torch.cat, zip(*(output.routings[name] for output in outputs), strict=True)))
        for name in outputs[0].routings
    }
    return Drawn(images, [frame.caption for frame in frames], routings)


def routers(generator):
    """Every router of a generator, by the name that Output.routings gives it."""
    return {
        f"{level.resolution}.{i}.{depth}": block.router
        for level in generator.synthesis.levels
        for i, attention in enumerate(level.attentions)
        for depth, block in enumerate(attention.blocks)
    }


@contextlib.contextmanager
def forced(generator, name, points, expert):
    """While it lasts, a router sends feature points, a mask [B, N] or [N], to one expert. Raises UserError."""
    if name not in (known := routers(generator)):
        raise UserError(f"there is no router {name}; there are {', '.join(known) or 'none'}")
    if not 0 <= expert < (count := len(known[name].to_logits.weight)):
        raise UserError(f"there is no expert {expert}; router {name} has {count}")

    def redirect(_, inputs, routing):
        return routing.sent_to(torch.where(points, expert, routing.expert_index))

    handle = known[name].register_forward_hook(redirect)
    try:
        yield
    finally:
        handle.remove()
