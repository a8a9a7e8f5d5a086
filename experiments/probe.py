"""Two questions to a generator of the built-in scenes: what do its experts tell apart, and how smooth are its paths?

    python -m experiments.probe

Experts: the mutual information, in bits, between the expert that took a point and whether the image shows the object or
the background there. Beside it is the same number with the points of each image shuffled. Paths: how evenly the image
changes in equal steps from one prompt to another, and from one noise to another.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from common.cli import HelpFormatter, positive_int, told_in_one_line
from data.scenes import BACKGROUNDS, COLORS
from evaluation.extractors import load_extractor
from evaluation.features import to_pixels
from evaluation.judge import scenes_with
from sampling import latent, views
from sampling.pipeline import draw
from weights.checkpoint import SHAPES, load_generator

STEPS = 16  # in each path
UNLIKE = 0.7  # least distance of object and background, in RGB of [0, 1], at which a pixel is clearly one of them


def mutual_information(experts, labels):
    """I(expert; label) in bits of two sets of integers [N], from their joint histogram."""
    joint = torch.zeros(int(experts.max()) + 1, int(labels.max()) + 1, dtype=torch.float64)
    joint.index_put_((experts, labels), torch.ones(len(experts), dtype=torch.float64), accumulate=True)
    joint /= joint.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    bits = torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, independent)
    return bits.sum().item() / math.log(2)


def object_mask(image, scene, side):
    """An image [3, R, R] of a scene of one object → [side²], 1 where it shows the object, 0 for the background."""
    points = (F.interpolate(image[None], side, mode="area")[0].flatten(1).T + 1) / 2  # [side², 3]
    colors = torch.tensor([BACKGROUNDS[scene.background], COLORS[scene.objects[0].color]])
    return torch.cdist(points, colors).argmin(1)


def is_plain(scene):
    """Whether the caption names the background, and its color is far from the object's."""
    background, color = BACKGROUNDS[scene.background], COLORS[scene.objects[0].color]
    return scene.background in scene.caption and torch.dist(torch.tensor(background), torch.tensor(color)) > UNLIKE


@torch.no_grad()
def experts_know(generator, clip, count):
    """→ {router: {what: bits}}: over all points, within single images on average, and both with points shuffled."""
    scenes = [scene for scene in scenes_with(1, 3 * count) if is_plain(scene)][:count]
    z = latent.noise(generator, len(scenes), seed=1)
    captions = [scene.caption for scene in scenes]
    drawn = draw(generator, views.frames(generator, z, latent.read(generator, clip, captions), 1, captions))
    rng = torch.Generator().manual_seed(0)
    result = {}
    for name, routing in drawn.routings.items():
        side = int(name.split(".")[0])
        pairs = zip(drawn.images, scenes, strict=True)
        experts, masks = routing.expert_index, torch.stack([object_mask(image, scene, side) for image, scene in pairs])
        shuffled = torch.stack([mask[torch.randperm(len(mask), generator=rng)] for mask in masks])
        result[name] = {
            "over all points": mutual_information(experts.flatten(), masks.flatten()),
            "over all points, shuffled": mutual_information(experts.flatten(), shuffled.flatten()),
            "within a picture": mean_information(experts, masks),
            "within a picture, shuffled": mean_information(experts, shuffled),
            "at most (what there is to know)": mutual_information(masks.flatten(), masks.flatten()),
        }
    return result


def mean_information(experts, masks):
    return sum(map(mutual_information, experts, masks)) / len(masks)


@torch.no_grad()
def path_steps(generator, clip, extractor, count):
    """→ {path: sizes of its steps [count, STEPS]}, as distances between features of unit length."""
    scenes = scenes_with(1, 2 * count)
    captions = [(a.caption, b.caption) for a, b in zip(scenes[::2], scenes[1::2], strict=True)]
    paths = {}
    for kind in ("spherical", "linear"):
        paths[f"text, {kind}"] = [
            views.interpolation(generator, clip, pair, i, 1, STEPS + 1, "both", kind) for i, pair in enumerate(captions)
        ]
        paths[f"noise, {kind}"] = [noise_path(generator, clip, a, i, kind) for i, (a, _) in enumerate(captions)]
    sizes = {}
    for name, lists in paths.items():
        images = draw(generator, [frame for frames in lists for frame in frames]).images
        features = F.normalize(extractor.images(to_pixels(images, images.shape[-1])), dim=-1)
        features = features.unflatten(0, (count, STEPS + 1))
        sizes[name] = (features[:, 1:] - features[:, :-1]).norm(dim=-1)
    return sizes


def noise_path(generator, clip, prompt, number, kind):
    """The frames of one prompt, from one noise to another."""
    start, end = latent.noise(generator, 2, number).split(1)
    z = torch.cat([views.between(start, end, t, kind) for t in torch.linspace(0, 1, STEPS + 1)])
    return views.frames(generator, z, latent.read(generator, clip, [prompt]), 1, [prompt] * len(z))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SHAPES, help="generator_ema.safetensors of a run")
    parser.add_argument("--count", type=positive_int, default=200, help="pictures, and half as many paths of each kind")
    args = parser.parse_args()
    with told_in_one_line():
        generator, clip, _ = load_generator(args.checkpoint)
        for router, bits in experts_know(generator, clip, args.count).items():
            print(f"Expert and object or background at {router}, {args.count} pictures of one object, bits:")
            for what, value in bits.items():
                print(f"  {what:32s} {value:.4f}")
        extractor = load_extractor("small", "--features", torch.device("cpu"))
        print(f"Paths of {STEPS} steps, {-(-args.count // 2)} of each kind; features: {extractor.name}")
        for name, sizes in path_steps(generator, clip, extractor, -(-args.count // 2)).items():
            uneven = (sizes.max(1).values / sizes.mean(1)).mean()
            print(f"  {name:16s} length {sizes.sum(1).mean():.3f}, largest step {uneven:.2f} times the mean one")


if __name__ == "__main__":
    main()
