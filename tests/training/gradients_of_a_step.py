"""The gradients of one training step, for test_distributed.py: torchrun gradients_of_a_step.py FILE DTYPE [OPTION …].

A whole step of train.py at 8×8 and at the highest resolution, R1 included, with random weights everywhere, zeros
included.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch

import train
from clip import MiniLM, Text
from common import distributed
from data import sources
from tests import figures  # noqa: F401 - it has the preset


def main(path, dtype, *options):
    torch.set_default_dtype(getattr(torch, dtype))
    read_in_the_dtype()
    device = distributed.start("cpu")
    arguments = f"--preset tiny --clip emoji --dtype fp32 --workers 0 --batch 8 --out {path}.run".split()
    run = train.build(train.parse_args([*arguments, *options]), device)
    learner, micro_batches = run.learner, run.loop.micro_batches
    torch.manual_seed(1)
    for network in (learner.generator, learner.discriminator):
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    gradients = {}
    for stage in (learner.resolutions[:2], learner.resolutions):
        learner.learn_at(stage)
        for group in learner.optimizer_d.param_groups + learner.optimizer_g.param_groups:
            group["lr"] = 0.0  # else Adam's first step would make of each gradient its sign
        loader = sources.loader(run.source, 0, learner.batch // micro_batches, 0)
        batches = [some_alike(next(loader)) for _ in range(micro_batches)]
        report = learner.step(0, learner.prepare(0, 0, batches))
        assert report["r1"] > 0 and report["g_clip"] > 0 and report["d_matching"] > 0
        gradients |= {
            f"{stage[-1]}.{kind}.{name}": parameter.grad.clone()
            for kind, network in (("g", learner.generator), ("d", learner.discriminator))
            for name, parameter in network.named_parameters()
            if parameter.grad is not None
        }
    if distributed.is_main():
        torch.save(gradients, path)
    distributed.stop()


def read_in_the_dtype():
    """MiniLM remembers captions in half precision, and gives them in float32: here in the dtype at hand."""
    read = MiniLM.read

    def read_in_dtype(encoder, captions):
        return Text(*(x.to(torch.get_default_dtype()) if x.is_floating_point() else x for x in read(encoder, captions)))

    MiniLM.read = read_in_dtype


def some_alike(batch):
    """The batch in the dtype at hand, about half of its captions the same, which are not wrong for one another."""
    captions = ["red circle" if len(caption) % 2 else caption for caption in batch.captions]
    return batch._replace(images=batch.images.to(torch.get_default_dtype()), captions=captions)


if __name__ == "__main__":
    main(*sys.argv[1:])
