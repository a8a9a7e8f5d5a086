"""Two CUDA devices that are simulated by the CPU."""

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parent.parent


class OnCpu(TorchFunctionMode):
    """Replaces CUDA devices by the CPU in all calls of PyTorch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        kwargs = {name: on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(on_cpu, args), **kwargs)


def on_cpu(value):
    is_cuda = isinstance(value, torch.device | str) and str(value).partition(":")[0] == "cuda"
    return torch.device("cpu") if is_cuda else value


@contextlib.contextmanager
def two_gpus_on_cpu():
    """CUDA reports two GPUs of 80 GB. The CPU computes, and gloo replaces NCCL.

    Autocast is on only for CUDA, so it changes nothing.
    """
    start = torch.distributed.init_process_group
    with contextlib.ExitStack() as stack:
        for name, value in {
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.is_bf16_supported": lambda: True,
            "torch.cuda.device_count": lambda: 2,
            "torch.cuda.set_device": is_own,
            "torch.cuda.get_device_name": lambda device: "no GPU",
            "torch.cuda.get_device_properties": lambda device: SimpleNamespace(total_memory=80e9),
            "torch.cuda.is_current_stream_capturing": lambda: False,
            "torch.accelerator.current_stream": lambda: SimpleNamespace(is_capturing=lambda: False),
            "torch.distributed.init_process_group": lambda backend, **options: start("gloo", **options),
            "step.DistributedDataParallel": GpuParallel,
        }.items():
            stack.enter_context(mock.patch(name, value))
        yield stack.enter_context(OnCpu())


def is_own(device):
    assert device.index == int(os.environ["LOCAL_RANK"])  # two ranks on one GPU share its memory


class GpuParallel(DistributedDataParallel):
    """Accepts a module on the CPU with the device_ids of a GPU."""

    def __init__(self, module, device_ids, **options):
        assert len(device_ids) == 1
        super().__init__(module, **options)
