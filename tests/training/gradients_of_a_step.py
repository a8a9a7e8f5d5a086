"""Gradients of training steps in float64, R1 included, for test_distributed.py.

torchrun --nproc-per-node 2 -m tests.training.gradients_of_a_step FILE
"""

import copy
import dataclasses
import sys

import torch
from torch.utils._pytree import tree_map

from clip import load_clip
from common import distributed
from common.cli import UserError
from step import Learner
from tests.figures import LARGER, TINY, Figures, moved
from weights.efficientnet import load_efficientnet

BATCH = 8  # on all ranks
IN_GROUPS = dataclasses.replace(TINY, discriminator=dataclasses.replace(TINY.discriminator, group=2))
FEW_FOR_CLIP = dataclasses.replace(IN_GROUPS, recipe=dataclasses.replace(TINY.recipe, clip_lower_every=4))
CASES = {"base": (FEW_FOR_CLIP, 1), "base in micro-batches": (IN_GROUPS, 2), "upsampler": (LARGER, 1)}


def gradients():
    """The gradient of every parameter that learns at the two lowest resolutions, {name: tensor}; the same on all ranks.

    Weights that start at zero are random too. About half of the captions are equal, so not wrong for each other.
    """
    found = {}
    for case, (preset, num_micro_batches) in CASES.items():
        torch.manual_seed(1)
        clip = copy.deepcopy(load_clip("emoji")).double()
        clip.text.cache.clear()  # of other tests, in single precision
        perceptual = load_efficientnet(features_only=True).double()
        learner = Learner(preset, clip, torch.device("cpu"), torch.float32, BATCH, perceptual)
        networks = {"g": moved(learner.generator.double()), "d": moved(learner.discriminator.double())}
        learner.ema.double()
        learner.learn_at(learner.resolutions[:2])
        for group in learner.optimizer_d.param_groups + learner.optimizer_g.param_groups:
            group["lr"] = 0.0  # otherwise Adam's first step replaces each gradient by its sign
        rank, ranks = distributed.rank(), distributed.world_size()
        source, size = Figures(learner.resolutions[-1]), BATCH // ranks // num_micro_batches
        batches, micro_batches = [], []
        for batch in source.batches(range(num_micro_batches), size, rank, ranks):
            captions = ["red circle" if len(caption) % 2 else caption for caption in batch.captions]
            batches.append(batch._replace(captions=captions))
        for batch, micro_batch in zip(batches, learner.prepare(0, 0, batches), strict=True):
            text = clip.encode_text(clip.tokenize(batch.captions))  # clip.read keeps texts in half precision
            micro_batch = micro_batch._replace(text=text)
            micro_batches.append(tree_map(lambda x: x.double() if x.is_floating_point() else x, micro_batch))
        report = learner.step(0, micro_batches)
        assert report["r1"] > 0 and report["g_clip"] > 0 and report["d_matching"] > 0
        for kind, network in networks.items():
            for name, parameter in network.named_parameters():
                if parameter.grad is not None:
                    found[f"{case}, {kind}.{name}"] = parameter.grad.clone()
    return found


def main(path):
    with distributed.ranks("cpu"):
        found = gradients()
        try:
            with distributed.together():
                if distributed.rank() == 1:
                    raise UserError("a mistake of rank 1")
        except UserError as error:
            messages = distributed.collect(str(error))
        if distributed.is_main():
            torch.save((found, messages), path)


if __name__ == "__main__":
    main(sys.argv[1])
