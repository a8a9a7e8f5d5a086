"""From a picture back to w: gradient descent on the w of each layer, until the generator draws the picture.

The loss is losses.perceptual_distance with EfficientNet, the squared error of pixels, and a pull toward the prompt's w.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import trange

from losses import perceptual_distance
from sampling import inference, latent, views
from sampling.pictures import in_range
from weights.efficientnet import load_efficientnet

SIDE = 96  # pixels that EfficientNet sees
CANDIDATES = 64  # random w of the prompt; the fit starts at the one with the nearest picture, or at w_avg
STEPS = 300
RATE = 0.05  # Adam's first learning rate
PIXELS = 1.0  # weight of the pixels' mean squared error
PULL = 0.01  # weight of the distance to the prompt's mean w: a w unlike those of training cannot be edited


class Fit(NamedTuple):
    """A picture, fitted."""

    w: torch.Tensor  # [num_layers, w_dim]
    text: latent.Prompt  # one row
    distance: float  # perceptual distance to the picture
    nearest: float  # that of the nearest candidate
    random: float  # the mean of all candidates


class Perceptual:
    """The perceptual distance of images [B, 3, R, R] to one picture [3, R, R], both in [−1, 1] → [B], in 0…4."""

    def __init__(self, picture):
        self.network = load_efficientnet(features_only=True).to(picture.device, memory_format=torch.channels_last)
        self.wanted = self.maps(picture[None])

    def maps(self, images):
        images = F.interpolate(images, SIDE, mode="bicubic", antialias=True)
        return self.network(images.contiguous(memory_format=torch.channels_last))

    def __call__(self, images):
        return perceptual_distance(self.maps(images), self.wanted)


def synthesize(generator, w, local_text):
    """w [B, w_dim] or [B, num_layers, w_dim] → images [B, 3, R, R], not clamped, so that every pixel has a gradient."""
    with inference.autocast(generator):
        return generator.synthesis(w, local_text).image.float()


@torch.enable_grad()
def fit(pipe, picture, prompt, steps):
    """A picture [3, R, R] in [−1, 1] and a prompt that describes it → Fit. A progress bar shows the distance."""
    generator = pipe.generator
    picture = picture.to(generator.w_avg.device)
    distance = Perceptual(picture)
    with torch.no_grad():
        text = latent.read(generator, pipe.clip, [prompt])
        codes = generator.mapping(latent.noise(generator, CANDIDATES, 0), text.global_text.expand(CANDIDATES, -1))
        spread, mean = torch.std_mean(codes, 0)
        starts = torch.cat([codes, generator.w_avg[None]])  # StyleGAN2's projector starts at the mean of all prompts
        of_starts = []
        for part in starts.split(latent.BATCH):
            images = synthesize(generator, part, text.local_text.expand(len(part), -1, -1))
            of_starts.append(distance(in_range(images)))
        of_starts = torch.cat(of_starts)
        of_candidates = of_starts[:CANDIDATES]
    start = starts[of_starts.argmin()]
    w = start.expand(generator.synthesis.num_layers, -1).clone().requires_grad_()
    optimizer = torch.optim.Adam([w], RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best = of_starts.min().item(), w.detach().clone()
    bar = trange(steps, desc="fitting")
    for _ in bar:
        image = synthesize(generator, w[None], text.local_text)
        perceptual = distance(image)[0]
        error = (image[0] - picture).square().mean()
        pull = ((w - mean) / (spread + 1e-2)).square().mean()
        optimizer.zero_grad()
        (perceptual + PIXELS * error + PULL * pull).backward(inputs=[w])
        if perceptual.item() < best[0]:
            best = perceptual.item(), w.detach().clone()
        optimizer.step()
        schedule.step()
        bar.set_postfix(distance=f"{perceptual.item():.3f}")
    reached = distance(in_range(synthesize(generator, best[1][None], text.local_text))).item()
    return Fit(best[1], text, reached, of_candidates.min().item(), of_candidates.mean().item())


@torch.no_grad()
def edited(pipe, fitted, prompt):
    """The Frame of a fitted picture under another prompt: w moves by the difference of the prompts' mean w."""
    generator, text = pipe.generator, latent.read(pipe.generator, pipe.clip, [prompt])
    step = latent.mean_code(generator, text.global_text) - latent.mean_code(generator, fitted.text.global_text)
    return views.Frame(fitted.w + step, text.local_text[0], prompt)


def frames(pipe, picture, prompts):
    """A picture [3, R, R] in [−1, 1], a prompt that describes it, others to edit it → frames, a report of the fit."""
    fitted = fit(pipe, picture, prompts[0], STEPS)
    report = (
        f"The fit has a perceptual distance of {fitted.distance:.3f} to the picture; of {CANDIDATES} random pictures "
        f"of the prompt the nearest has {fitted.nearest:.3f}, the mean {fitted.random:.3f}"
    )
    first = views.Frame(fitted.w, fitted.text.local_text[0], f"fitted: {prompts[0]}")
    drawn = [first, *[edited(pipe, fitted, prompt) for prompt in prompts[1:]]]
    if pipe.upsampler:
        large = views.samples(pipe.upsampler, pipe.clip, prompts, 1, 0, 1.0)
        drawn = [frame._replace(large=its) for frame, its in zip(drawn, large, strict=True)]
    return drawn, report
