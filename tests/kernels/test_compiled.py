"""The kernels as compiled for GPUs fit into the shared memory of a multiprocessor, no registers spill, and no product
is rounded to TF32.

Triton's own ptxas compiles them, so this machine needs no GPU. The test runs this file as a script, without Triton's
interpreter.
"""

import os
import re
import subprocess
import sys
import tempfile
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget

from experts import Experts
from kernels import l2_attention, routed
from tests import ROOT

POINTS, WIDTH, EXPERTS, HEADS = 4096, 512, 16, 8  # of the release
# {compute capability: KiB of shared memory available to a block}, from CUDA's programming guide
SHARED = {86: 99, 90: 227}


def test_kernels_compile_without_spilling():
    """If registers do not suffice, ptxas puts values on the stack, which is in the slowest memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.test_compiled"]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    launches = 4 + 2 + 3  # down_kernel and weight_gradient_kernel twice
    assert len(lines) == launches * len(SHARED) * 2  # dtypes
    for *_, capability, shared, stack in lines:
        assert int(shared) <= SHARED[int(capability)] * 1024 and int(stack) == 0, run.stdout


class Compiled:
    """A kernel that is compiled instead of launched."""

    def __init__(self, kernel, driver):
        self.kernel, self.driver = kernel, driver

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, **options):
        dtypes = [x.dtype if isinstance(x, torch.Tensor) else x for x in args]
        for capability in SHARED:
            self.driver.get_current_device.return_value = capability  # Triton caches kernels by device
            self.driver.get_current_target.return_value = GPUTarget("cuda", capability, 32)
            compiled = self.kernel.warmup(*dtypes, grid=None, **options)
            assert "tf32" not in compiled.asm["ptx"]
            dtype = str(dtypes[0]).removeprefix("torch.")
            shared, stack = compiled.metadata.shared, stack_of(compiled.asm["cubin"])
            print(self.kernel.__name__, dtype, capability, shared, stack, flush=True)


def stack_of(cubin):
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.search(r"STACK:(\d+)", usage)[1]


def main():
    """A forward and a backward pass of both families in both dtypes, of tensors without content.

    Prints a line for each launch: kernel, dtype, compute capability, bytes of shared memory, and of a thread's stack.
    """
    triton.runtime.driver.set_active(driver := Mock())
    for module in (routed, l2_attention):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Compiled(getattr(module, name), driver))
    for dtype in (torch.bfloat16, torch.float32):
        with torch.device("meta"):
            points, gate = torch.empty(POINTS, WIDTH, dtype=dtype), torch.empty(POINTS)
            stacks = [x.to(dtype) for x in Experts(WIDTH, EXPERTS).parameters()]
            points, gate, *stacks = (x.detach().requires_grad_() for x in (points, gate, *stacks))
            result = routed.RoutedExperts.apply(points, torch.empty(POINTS, dtype=torch.long), gate, *stacks)
            result.backward(torch.empty_like(result))
            q, k, v = torch.empty(3, HEADS, POINTS, WIDTH // HEADS, dtype=dtype)
            l2_attention.backward(q, k, v, *l2_attention.forward(q, k, v), upstream=v)


if __name__ == "__main__":
    main()
