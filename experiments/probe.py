"""Two questions to a generator of emoji: what do its experts tell apart, and how smooth are its paths?

    python -m experiments.probe

Experts: the mutual information, in bits, between the expert that took a point and whether the image shows the object or
the white background there. Beside it is the same number with the points of each image shuffled. Paths: how evenly the
image changes in equal steps from one prompt to another, and from one noise to another.
"""

import argparse
import itertools
import math

import torch
import torch.nn.functional as F

from common.cli import HelpFormatter, a_path, positive_int, told_in_one_line
from data import sources
from evaluation.extractors import load_extractor
from evaluation.features import to_pixels
from sampling import latent, views
from sampling.pipeline import draw
from weights.checkpoint import DEMO, load_generator

STEPS = 16  # in each path
UNLIKE = 0.1  # A point is of the object if one of its colors, in [0, 1], is so far from white.


def mutual_information(experts, labels):
    """I(expert; label) in bits of two sets of integers [N], from their joint histogram."""
    joint = torch.zeros(int(experts.max()) + 1, int(labels.max()) + 1, dtype=torch.float64)
    joint.index_put_((experts, labels), torch.ones(len(experts), dtype=torch.float64), accumulate=True)
    joint /= joint.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    bits = torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, independent)
    return bits.sum().item() / math.log(2)


def object_mask(images, side):
    """Images [B, 3, R, R] → [B, side²], 1 where a point is not of the white background."""
    return ((1 - F.interpolate(images, side, mode="area")).amax(1) > 2 * UNLIKE).flatten(1).long()


def names_of_emoji(count):
    """The captions of so many emoji of the training data."""
    examples = itertools.islice(sources.open_data("emoji", 64, seed=0).examples(), 4 * count)
    return list(dict.fromkeys(captions[0] for _, captions in examples))[:count]


@torch.no_grad()
def experts_know(generator, clip, captions):
    """→ {router: {what: bits}}."""
    z = latent.noise(generator, len(captions), seed=1)
    drawn = draw(generator, views.frames(generator, z, latent.read(generator, clip, captions), 1, captions))
    rng = torch.Generator().manual_seed(0)
    result = {}
    for name, routing in drawn.routings.items():
        masks = object_mask(drawn.images, side=int(name.split(".")[0]))
        shuffled = torch.stack([mask[torch.randperm(len(mask), generator=rng)] for mask in masks])
        experts, labels = routing.expert_index.flatten(), masks.flatten()
        result[name] = {
            "expert and object": mutual_information(experts, labels),
            "the same, points shuffled": mutual_information(experts, shuffled.flatten()),
            "at most (what there is to know)": mutual_information(labels, labels),
        }
    return result


def noise_path(generator, clip, prompt, seed):
    """The frames of one prompt, from one noise to another."""
    start, end = latent.noise(generator, 2, seed).split(1)
    z = torch.cat([views.between(start, end, t, "spherical") for t in torch.linspace(0, 1, STEPS + 1)])
    return views.frames(generator, z, latent.read(generator, clip, [prompt]), 1, [prompt] * len(z))


@torch.no_grad()
def path_steps(generator, extractor, paths):
    """Frames of some paths → the sizes of their steps [paths, STEPS], of features of unit length."""
    images = draw(generator, [frame for frames in paths for frame in frames]).images
    features = F.normalize(extractor.images(to_pixels(images, images.shape[-1])), dim=-1)
    features = features.unflatten(0, (len(paths), STEPS + 1))
    return (features[:, 1:] - features[:, :-1]).norm(dim=-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--checkpoint", type=a_path, default=DEMO, help="generator_ema.safetensors of a run")
    parser.add_argument("--count", type=positive_int, default=200, help="pictures, and half as many paths of each kind")
    args = parser.parse_args()
    with told_in_one_line():
        generator, clip, _ = load_generator(args.checkpoint)
        captions = names_of_emoji(args.count)
        for router, bits in experts_know(generator, clip, captions).items():
            print(f"Expert and object or background at {router}, {len(captions)} pictures, bits:")
            for what, value in bits.items():
                print(f"  {what:32s} {value:.4f}")
        extractor = load_extractor("judge", "--features", torch.device("cpu"))
        text_paths, noise_paths = [], []
        for seed, pair in enumerate(zip(captions[::2], captions[1::2], strict=False)):
            text_paths.append(views.interpolation(generator, clip, pair, seed, 1, STEPS + 1, "both", "spherical"))
            noise_paths.append(noise_path(generator, clip, pair[0], seed))
        print(f"Paths of {STEPS} steps, {len(text_paths)} of each kind; features: {extractor.name}")
        for name, paths in (("text", text_paths), ("noise", noise_paths)):
            sizes = path_steps(generator, extractor, paths)
            uneven = (sizes.max(1).values / sizes.mean(1)).mean()
            print(f"  {name:6s} length {sizes.sum(1).mean():.3f}, largest step {uneven:.2f} times the mean one")


if __name__ == "__main__":
    main()
