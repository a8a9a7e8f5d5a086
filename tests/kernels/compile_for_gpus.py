"""Compiles the kernels for GPUs that this machine need not have, with Triton's own ptxas; for test_compiled.py.

It launches the kernels of a forward and a backward pass at the release's width. A line for each: kernel, dtype, compute
capability, bytes of shared memory, and bytes of a thread's stack, which contains values that registers could not.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget

from experts import Experts
from kernels import l2_attention, routed
from tests.fake_cuda import DEVICE, fake_cuda

POINTS, WIDTH, EXPERTS, HEADS = 4096, 512, 16, 8
CAPABILITIES = 80, 86, 90


class Driver:
    """Replaces CUDA's driver. Triton caches kernels by device, so the number of a device is its capability."""

    capability = 0

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


class Compiled:
    """A kernel that is compiled instead of launched."""

    def __init__(self, kernel, driver):
        self.kernel, self.driver = kernel, driver

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, **options):
        for self.driver.capability in CAPABILITIES:
            dtypes = [x.dtype if isinstance(x, torch.Tensor) else x for x in args]
            compiled = self.kernel.warmup(*dtypes, grid=None, **options)
            dtype = str(dtypes[0]).removeprefix("torch.")
            shared, stack = compiled.metadata.shared, stack_of(compiled.asm["cubin"])
            print(self.kernel.__name__, dtype, self.driver.capability, shared, stack, flush=True)


def stack_of(cubin):
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.search(r"STACK:(\d+)", usage)[1]


def main():
    triton.runtime.driver.set_active(driver := Driver())
    for dtype in (torch.bfloat16, torch.float32):
        with fake_cuda(lambda kernel: Compiled(kernel, driver)), DEVICE:
            points, gate = torch.empty(POINTS, WIDTH, dtype=dtype), torch.empty(POINTS)
            stacks = [x.to(dtype) for x in Experts(WIDTH, EXPERTS).parameters()]
            leaves = [x.detach().requires_grad_() for x in (points, gate, *stacks)]
            result = routed.routed_experts(leaves[0], torch.empty(POINTS, dtype=torch.long), *leaves[1:])
            torch.autograd.grad(result, leaves, torch.empty_like(result))
            q, k, v = torch.empty(3, HEADS, POINTS, WIDTH // HEADS, dtype=dtype)
            l2_attention.backward(q, k, v, *l2_attention.forward(q, k, v), upstream=v)


if __name__ == "__main__":
    main()
