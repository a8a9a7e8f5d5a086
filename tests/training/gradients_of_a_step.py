"""The gradients of training steps, for test_distributed.py: torchrun gradients_of_a_step.py FILE.

Whole steps in float64 at 8×8 and at the highest resolution, R1 included; weights that start at zero are random too.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch

from clip import MiniLM, Text
from common import distributed
from data import sources
from tests import figures
from tests.training.runs import build

CASES = (
    "--preset tiny --set clip_lower_every=4",
    "--preset tiny --accumulate 2",
    "--preset tiny-larger",
)


def main(path):
    in_groups = dataclasses.replace(figures.TINY.discriminator, group=2)
    figures.PRESETS["tiny"] = dataclasses.replace(figures.TINY, discriminator=in_groups)
    torch.set_default_dtype(torch.float64)
    read_in_float64()
    with distributed.ranks("cpu"):
        data = distributed.broadcast(str(figures.folder()))
        gradients = {}
        for number, case in enumerate(CASES):
            out = Path(f"{path}.run{number}")
            options = f"{case} --data {data} --clip emoji --dtype fp32 --workers 0 --batch 8 --out {out}"
            for name, gradient in gradients_of(build(*options.split())):
                gradients[f"{case} {name}"] = gradient.clone()
        if distributed.is_main():
            torch.save(gradients, path)


def gradients_of(run):
    """Yields the name and the gradient of every parameter that learns."""
    learner, micro_batches = run.learner, run.loop.micro_batches
    torch.manual_seed(1)
    for network in (learner.generator, learner.discriminator):
        figures.moved(network)
    for stage in (learner.resolutions[:2], learner.resolutions):
        learner.learn_at(stage)
        for group in learner.optimizer_d.param_groups + learner.optimizer_g.param_groups:
            group["lr"] = 0.0  # otherwise Adam's first step replaces each gradient by its sign
        loader = sources.loader(run.source, 0, learner.batch // micro_batches, 0)
        batches = [some_alike(next(loader)) for _ in range(micro_batches)]
        report = learner.step(0, learner.prepare(0, 0, batches))
        assert report["r1"] > 0 and report["g_clip"] > 0 and report["d_matching"] > 0
        for kind, network in (("g", learner.generator), ("d", learner.discriminator)):
            for name, parameter in network.named_parameters():
                if parameter.grad is not None:
                    yield f"{stage[-1]}.{kind}.{name}", parameter.grad


def read_in_float64():
    """Makes MiniLM return float64; it caches captions in half precision."""
    read = MiniLM.read

    def read_in_float64(encoder, captions):
        return Text(*(x.double() if x.is_floating_point() else x for x in read(encoder, captions)))

    MiniLM.read = read_in_float64


def some_alike(batch):
    """The batch in float64, with about half of its captions equal; equal captions are not wrong for each other."""
    captions = ["red circle" if len(caption) % 2 else caption for caption in batch.captions]
    return batch._replace(images=batch.images.double(), captions=captions)


if __name__ == "__main__":
    main(*sys.argv[1:])
