"""train.py for test_distributed.py: torchrun -m tests.training.stopped_rank, with options of train.py.

The first time, rank 1 alone is asked to stop in the middle of step 3; torchrun starts both again.
"""

import os
import signal

import train
from step import Learner
from tests import figures  # noqa: F401 - adds the preset


def step(learner, number, micro_batches, learn=Learner.step):
    if number == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    return learn(learner, number, micro_batches)


if __name__ == "__main__":
    Learner.step = step
    train.main()
