"""The kernels as compiled for GPUs fit into the shared memory of a multiprocessor, and no registers spill."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent
SHARED = {80: 163, 86: 99, 90: 227}  # KiB available to a block (CUDA's programming guide, compute capabilities)


def test_kernels_compile_without_spilling():
    """If registers do not suffice, ptxas puts values on the stack, which is in the slowest memory."""
    command = [sys.executable, str(Path(__file__).parent / "compile_for_gpus.py")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    launches = 4 + 2 + 3  # down_kernel and weight_gradient_kernel twice
    assert len(lines) == launches * len(SHARED) * 2  # dtypes
    for *_, capability, shared, stack in lines:
        assert int(shared) <= SHARED[int(capability)] * 1024 and int(stack) == 0, run.stdout
