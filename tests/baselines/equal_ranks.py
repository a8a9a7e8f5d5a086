"""Trains Muse with its command for four steps under torchrun, and fails if the ranks' networks differ.

torchrun --nproc-per-node 2 tests/baselines/equal_ranks.py OUT DATA
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from baselines import muse, shared
from common import distributed
from training.loop import Loop

save_run = shared.save_run


def compare_ranks(loop, system):
    states = distributed.collect(system.networks.state_dict())
    for name, value in states[0].items():
        assert all(torch.equal(value, state[name]) for state in states), name
    distributed.say(f"step {loop.progress.step}: {len(states)} ranks with equal networks")
    save_run(loop, system)


muse.TOKENIZER_IMAGES = 16  # two steps of the VQGAN, then two of the transformer
shared.NUM_PICTURES, shared.save_run, shared.Loop = 2, compare_ranks, functools.partial(Loop, last_step=4)
sys.argv[1:] = ["train", "--data", sys.argv[2], "--batch", "8", "--workers", "0", "--out", sys.argv[1]]
shared.main(muse.Muse)
