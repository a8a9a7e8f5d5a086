"""Trains Muse by its command for a few steps, under torchrun, and fails where the ranks' networks differ.

torchrun --nproc-per-node 2 tests/baselines/equal_ranks.py OUT DATA
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from baselines import muse, shared
from common import distributed
from training.loop import Loop

system = []


class Short(Loop):
    """Two steps of the VQGAN, two of the transformer, and a look at what the ranks hold."""

    def __init__(self, folder, options, batch, minutes):
        super().__init__(folder, options, batch, last_step=4)

    def conclude(self):
        super().conclude()
        (muse,) = system
        states = distributed.collect({name: network.state_dict() for name, network in muse.networks.items()})
        for name, state in states[0].items():
            for key, value in state.items():
                assert all(torch.equal(value, other[name][key]) for other in states[1:]), f"{name}.{key}"
        distributed.say(f"{len(states)} ranks with {len(muse.networks)} equal networks")


class Kept(muse.Muse):
    def __init__(self, *options):
        super().__init__(*options)
        system.append(self)


muse.TOKENIZER_IMAGES = 16
shared.Loop, shared.NUM_PICTURES = Short, 2
sys.argv[1:] = ["train", "--data", sys.argv[2], "--batch", "8", "--workers", "0", "--out", sys.argv[1]]
shared.main(Kept)
