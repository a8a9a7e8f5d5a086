"""train.py on two GPUs that are not there, for test_distributed.py: torchrun two_gpus.py, with options of train.py.

The first time, rank 1 alone is asked to stop in the middle of step 3; torchrun starts both again.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import dataclasses

import train
from presets import PRESETS
from step import Learner
from tests.fake_cuda import two_gpus_on_cpu
from tests.figures import TINY

GENERATOR, DISCRIMINATOR = (
    dataclasses.replace(config, levels=config.levels[:2]) for config in (TINY.generator, TINY.discriminator)
)
RECIPE = dataclasses.replace(
    TINY.recipe, steps=5, batch=4, images_per_phase={4: 8}, fid_samples=8, fid_every=8, fid_factor=0.0
)
PRESETS["tiny"] = dataclasses.replace(TINY, generator=GENERATOR, discriminator=DISCRIMINATOR, recipe=RECIPE)


def step(learner, number, micro_batches, learn=Learner.step):
    if number == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    return learn(learner, number, micro_batches)


if __name__ == "__main__":
    Learner.step = step
    with two_gpus_on_cpu():
        train.main()
