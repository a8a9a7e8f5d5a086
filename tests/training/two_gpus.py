"""train.py on two GPUs that are not there, for test_distributed.py: torchrun two_gpus.py, with options of train.py.

The first time, rank 1 alone is asked to stop in the middle of step 3; torchrun starts both again.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import train
from presets import PRESETS, DiscriminatorConfig, DiscriminatorLevel, GeneratorConfig, Level, Preset, Recipe
from tests.fake_cuda import two_gpus_on_cpu

PRESETS["tiny"] = Preset(
    GeneratorConfig(
        levels=(Level(4, 32, num_blocks=1), Level(8, 32, num_blocks=1, attn_depth=1, num_experts=2)),
        fourier_channels=32, w_dim=32, mapping_layers=1, mapping_dim=32, text_dim=32, text_layers=1, num_heads=2,
        head_dim=16,
    ),
    DiscriminatorConfig(
        levels=(DiscriminatorLevel(4, 32, num_blocks=0), DiscriminatorLevel(8, 32, num_blocks=0, attn_depth=1)),
        text_dim=32, text_layers=1, num_heads=2, head_dim=16, head_layers=2, clip_channels=32,
    ),
    Recipe(steps=5, batch=4, images_per_phase={4: 8}, ema_half_life=100, fid_samples=8, fid_every=8, fid_factor=0.0),
    "emoji",
)  # fmt: skip


def step(run, number, batches, learn=train.Run.step):
    if number == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    return learn(run, number, batches)


if __name__ == "__main__":
    train.Run.step = step
    with two_gpus_on_cpu():
        train.main()
