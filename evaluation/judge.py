"""Reads images of the built-in scenes with a small classifier, and compares what it sees with what the captions say.

`python evaluate.py --data shapes` uses it. `python -m evaluation.judge` trains it on rendered scenes, of all pairs of
shape and color. No generator is trained against it.
"""

import argparse
import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from clip import MODELS
from common.cli import HelpFormatter, check_file, told_in_one_line
from common.disk import atomically
from data.scenes import BACKGROUNDS, COLORS, HELD_OUT, RADII, RELATIONS, SEEN, SHAPES, SIZES, make_scene, render
from evaluation import metrics
from sampling import latent

WEIGHTS = MODELS / "judge.safetensors"
RESOLUTIONS = (16, 32)  # below, a small shape is a dot
ARRANGEMENTS = ("one object", "side by side", "one above the other")
OBJECT = {"shape": list(SHAPES), "color": list(COLORS), "size": list(SIZES)}
ATTRIBUTES = {  # what it reads, and the possible values. Of two objects the left or the upper one is number 0.
    "background": list(BACKGROUNDS),
    "arrangement": list(ARRANGEMENTS),
    **{f"{attribute} {i}": values for i in range(2) for attribute, values in OBJECT.items()},
}
PAIRS = list(itertools.product(SHAPES, COLORS))  # also those held out from generators, as it must read them
TRAINING, UNSEEN = 1_000_000, 1_000_001  # seeds of scenes; no run with a usual seed sees these scenes


class Judge(nn.Module):
    """Images [B, 3, R, R] in [−1, 1], 16×16 or 32×32 → {attribute: logits [B, values]}, centres (x, y) [B, 2, 2]."""

    def __init__(self, width=32):
        super().__init__()
        channels = [(width, 2 * width, 1), (2 * width, 4 * width, 2), *[(4 * width, 4 * width, 1)] * 2]
        self.body = nn.Sequential(
            *convolution(3, width, kernel_size=4, stride=2),
            *itertools.chain.from_iterable(convolution(i, o, stride=stride) for i, o, stride in channels),
            *convolution(4 * width, 4 * width, stride=2),
            nn.Flatten(),
            nn.Linear(64 * width, 256, bias=False),
            nn.BatchNorm1d(256),
            nn.ReLU(),
        )
        self.head = nn.Linear(256, sum(map(len, ATTRIBUTES.values())) + 4)

    def forward(self, images):
        out = self.head(self.body(F.interpolate(images, 32, mode="bilinear")))
        logits, centres = out[:, :-4], out[:, -4:].unflatten(1, (2, 2))
        return dict(zip(ATTRIBUTES, logits.split([len(v) for v in ATTRIBUTES.values()], 1), strict=True)), centres

    @torch.no_grad()
    def read(self, images, batch=256):
        """Images → {attribute: index of the value seen [B]}, centres [B, 2, 2]. Ignore those of absent objects."""
        logits, centres = zip(*[self(part.clamp(-1, 1)) for part in images.split(batch)], strict=True)
        return {name: torch.cat([part[name] for part in logits]).argmax(1) for name in ATTRIBUTES}, torch.cat(centres)


def convolution(in_channels, out_channels, kernel_size=3, stride=1):
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU()


# ----------------------------------------------------------------------------------------------------------------------
# What is in a scene.


def in_reading_order(scene):
    """The objects of a scene. The left or the upper one comes first."""
    return scene.objects[:: RELATIONS[scene.relation][2]] if scene.relation else scene.objects


def truth(scenes):
    """Scenes → {attribute: index of its value [B]}, centres [B, 2, 2]. An absent object has −1 and NaN."""
    values = {name: torch.full((len(scenes),), -1) for name in ATTRIBUTES}
    centres = torch.full((len(scenes), 2, 2), math.nan)
    for b, scene in enumerate(scenes):
        values["background"][b] = ATTRIBUTES["background"].index(scene.background)
        values["arrangement"][b] = 1 + RELATIONS[scene.relation][1] if scene.relation else 0
        for i, o in enumerate(in_reading_order(scene)):
            centres[b, i] = torch.tensor([o.x, o.y])
            for attribute, names in OBJECT.items():
                values[f"{attribute} {i}"][b] = names.index(getattr(o, attribute))
    return values, centres


def accuracies(seen, scenes):
    """{what: share of the images in which it is right}. All scenes have one object, or all have two.

    An image with another number of objects is wrong in everything but the background, which counts only if the caption
    names it. "relation": the objects of both colors stand as asked.
    """
    asked, _ = truth(scenes)
    number = (seen["arrangement"] == 0) == (asked["arrangement"] == 0)
    right = {name: number & (seen[name] == asked[name]) for name in ATTRIBUTES}
    result = {"number": number}
    if scenes[0].relation:
        right |= {f"{a}s": right[f"{a} 0"] & right[f"{a} 1"] for a in OBJECT}
        swapped = number & (seen["color 0"] == asked["color 1"]) & (seen["color 1"] == asked["color 0"])
        result |= {"both colors": right["colors"] | swapped, "relation": right["arrangement"] & right["colors"]}
        result |= {"all in place": right["arrangement"] & right["colors"] & right["shapes"] & right["sizes"]}
    else:
        result |= {a: right[f"{a} 0"] for a in OBJECT} | {"shape and color": right["shape 0"] & right["color 0"]}
    named = torch.tensor([scene.background in scene.caption for scene in scenes])
    shares = {name: share.float().mean().item() for name, share in result.items()}
    return {"background": (seen["background"] == asked["background"])[named].float().mean().item()} | shares


def scenes_with(num_objects, count, pairs=PAIRS, seed=UNSEEN):
    """The first `count` scenes of a seed that have `num_objects` objects."""
    scenes = (make_scene(i, seed, pairs) for i in itertools.count())
    return list(itertools.islice((scene for scene in scenes if len(scene.objects) == num_objects), count))


# ----------------------------------------------------------------------------------------------------------------------
# The classifier.


def train(steps=2500, batch=128, lr=4e-3):
    """Trains a Judge on rendered scenes, half of them at 16×16, and noisy, as generated images are less clean."""
    torch.manual_seed(0)
    judge = Judge().train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in tqdm(range(steps), desc="training the judge", unit="step"):
        scenes = [make_scene(i, TRAINING, PAIRS) for i in range(step * batch, (step + 1) * batch)]
        images = torch.cat(
            [
                F.interpolate(render(part, r), 32, mode="bilinear")
                for part, r in zip((scenes[::2], scenes[1::2]), RESOLUTIONS, strict=True)
            ]
        )
        images += 0.03 * torch.rand(batch, 1, 1, 1) * torch.randn_like(images)
        values, centres = truth(scenes[::2] + scenes[1::2])
        logits, guesses = judge(images)
        loss = sum(F.cross_entropy(logits[name], values[name], ignore_index=-1) for name in ATTRIBUTES)
        loss += 10 * (guesses - centres)[centres.isfinite()].square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def load(path=WEIGHTS):
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# The verdict on a generator.


@torch.no_grad()
def generate(generator, clip, captions, seed):
    """Images for N captions [N, 3, R, R], and the share of the points that each expert took, {router: [E]}."""
    z = latent.noise(generator, len(captions), seed)
    images, totals = [], {}
    for output in latent.generate(generator, clip, captions, z):
        images.append(output.image.clamp(-1, 1).cpu())
        for name, counts in metrics.expert_counts(output.routings).items():
            totals[name] = totals.get(name, 0) + counts.cpu()
    return torch.cat(images), {name: total / total.sum() for name, total in totals.items()}


def spread(judge, generator, clip, seeds=100):
    """The standard deviation of an object's centre over seeds, divided by that in scenes; the mean over prompts.

    In scenes, centres are uniform between one radius from an edge and one radius from the opposite edge.
    """
    ratios = []
    for shape, size in itertools.product(SHAPES, SIZES):
        images, _ = generate(generator, clip, [f"a {size} blue {shape} on a white background"] * seeds, seed=0)
        _, centres = judge.read(images)
        expected = (1 - sum(RADII[1][size])) / math.sqrt(12)
        ratios.append(centres[:, 0].std(0).mean() / expected)
    return torch.stack(ratios).mean().item()


def verdict(judge, generator, clip, count):
    """→ {kind of prompt: ({what: share right in generated images}, {what: share right in rendered scenes})}."""
    resolution = generator.config.levels[-1].resolution
    asked = {
        "one object": scenes_with(1, count, SEEN),
        "one object, shape and color never seen together": scenes_with(1, count, sorted(HELD_OUT)),
        "two objects": scenes_with(2, count, SEEN),
    }
    result = {}
    for kind, scenes in asked.items():
        images, _ = generate(generator, clip, [scene.caption for scene in scenes], seed=1)
        sides = images, render(scenes, resolution)
        result[kind] = tuple(accuracies(judge.read(side)[0], scenes) for side in sides)
    return result


def main():
    parser = argparse.ArgumentParser(
        description="Trains the classifier of the built-in scenes.", formatter_class=HelpFormatter
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    with told_in_one_line():
        check_file(args.out)
        trained = train()
        atomically(args.out, lambda temporary: save_file(trained.state_dict(), temporary))


if __name__ == "__main__":
    main()
