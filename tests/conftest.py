"""What several test files share: tiny configurations, and the marker for tests that need a GPU."""

import gc
import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # as many tests at a time as there are cores, so one thread for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from presets import DiscriminatorConfig, DiscriminatorLevel, GeneratorConfig, Level
from sampling.pipeline import Pipeline
from tests.figures import TINY, generator_file
from weights.generator_file import load_generator


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    gc.freeze()  # what imports made lives on; gc.collect() of every short run would look through it


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def run_main(monkeypatch, capsys):
    """A command's main() with arguments → exit status, stdout, stderr."""

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as exit:
            status = exit.code
        said = capsys.readouterr()
        return status, said.out, said.err.strip()

    return run


@pytest.fixture(scope="session")
def demo():
    """The generator of figures.generator_file, and its CLIP."""
    return load_generator(generator_file())[:2]


@pytest.fixture(scope="session")
def pipe():
    """The demo model's, with both stages."""
    return Pipeline.load(device="cpu")


@pytest.fixture
def generator_config():
    """Three resolutions, the middle one without attention, adaptive and deformable kernels."""
    levels = (
        Level(4, 32, num_blocks=2, deformable=True),
        Level(8, 32, num_blocks=1, num_kernels=2, deformable=True),
        Level(16, 32, num_blocks=1, num_kernels=3, attn_depth=2, num_experts=4),
    )
    widths = dict(fourier_channels=24, z_dim=16, w_dim=20, mapping_dim=28, clip_width=12, text_dim=16)
    return GeneratorConfig(levels, **widths, mapping_layers=2, text_layers=1, num_heads=2, head_dim=8)


@pytest.fixture
def discriminator_config():
    levels = (
        DiscriminatorLevel(4, 32, num_blocks=1),
        DiscriminatorLevel(8, 32, num_blocks=1, attn_depth=1),
        DiscriminatorLevel(16, 32, num_blocks=1),
    )
    clip = dict(clip_maps=TINY.discriminator.clip_maps, clip_channels=8, clip_width=12)
    return DiscriminatorConfig(levels, **clip, text_dim=16, text_layers=1, num_heads=2, head_dim=8)


def assert_one_line(result, says):
    """That a command, run by run_main, was ended by a mistake of the user, of which it says one line."""
    status, _, error = result
    assert status == 2 and says in error and len(error.splitlines()) == 1, error


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_same_gradients(ours, expected, inputs):
    """The same gradients of two results by their inputs, from one random gradient of the results."""
    upstream = torch.randn_like(ours)
    pairs = zip(*(torch.autograd.grad(result, inputs, upstream) for result in (ours, expected)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)
