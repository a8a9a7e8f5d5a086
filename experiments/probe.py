"""Measures whether the experts of a generator of emoji separate the object from the white background.

    python -m experiments.probe

It prints, in bits, the mutual information between the expert that took a point and what the image shows there, and that
with the points of each image shuffled.
"""

import itertools
import math

import torch
import torch.nn.functional as F

from common.cli import Parser, UserError, a_path, errors_in_one_line, positive_int
from data import sources
from sampling import latent, views
from sampling.pipeline import draw, routers
from weights.generator_file import DEMO, load_generator

UNLIKE = 0.1  # a point belongs to the object if a color channel, in [0, 1], differs from white by more


def mutual_information(experts, labels):
    """I(expert; label) in bits of two sets of integers [N], from their joint histogram."""
    joint = torch.zeros(int(experts.max()) + 1, int(labels.max()) + 1, dtype=torch.float64)
    joint.index_put_((experts, labels), torch.ones(len(experts), dtype=torch.float64), accumulate=True)
    joint /= joint.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    bits = torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, independent)
    return bits.sum().item() / math.log(2)


def object_mask(images, side):
    """Images [B, 3, R, R] → [B, side²]: 1 for a point of the object, 0 for the white background."""
    return ((1 - F.interpolate(images, side, mode="area")).amax(1) > 2 * UNLIKE).flatten(1).long()


def names_of_emoji(count):
    """The captions of `count` training emoji."""
    examples = itertools.islice(sources.open_data("emoji", 64, seed=0).examples(), 4 * count)
    return list(dict.fromkeys(captions[0] for _, captions in examples))[:count]


@torch.no_grad()
def experts_know(generator, text_encoder, captions):
    """→ {router: {what: bits}}."""
    z = latent.noise(generator, len(captions), seed=1)
    drawn = draw(generator, views.frames(generator, z, latent.read(generator, text_encoder, captions), 1, captions))
    rng = torch.Generator().manual_seed(0)
    result = {}
    for name, routing in drawn.routings.items():
        masks = object_mask(drawn.images, side=int(name.split(".")[0]))
        shuffled = torch.stack([mask[torch.randperm(len(mask), generator=rng)] for mask in masks])
        experts, labels = routing.expert_index.flatten(), masks.flatten()
        result[name] = {
            "expert and object": mutual_information(experts, labels),
            "expert and object, points shuffled": mutual_information(experts, shuffled.flatten()),
            "at most (entropy of the object)": mutual_information(labels, labels),
        }
    return result


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=a_path, default=DEMO, help="a run, or its generator")
    parser.add_argument("--count", type=positive_int, default=200, help="pictures")
    args = parser.parse_args()
    with errors_in_one_line():
        generator, text_encoder, _ = load_generator(args.checkpoint)
        if not routers(generator):
            raise UserError(f"{args.checkpoint} has no experts; give a model that draws 8×8 or more")
        captions = names_of_emoji(args.count)
        for router, bits in experts_know(generator, text_encoder, captions).items():
            print(f"Expert and object or background at {router}, {len(captions)} pictures, bits:")
            for what, value in bits.items():
                print(f"  {what:34s} {value:.4f}")


if __name__ == "__main__":
    main()
