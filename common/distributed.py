"""The few calls to torch.distributed. Each also works in a single process."""

import contextlib
import datetime
import gc
import os
import platform
import re
import warnings

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather
from tqdm import tqdm

from common.cli import UserError, first_line

# What replaces them is not in every PyTorch since 2.8; open_clip's loss calls the first as well.
for name in ("all_gather", "`broadcast_buffers`"):
    warnings.filterwarnings("ignore", message=f".*{name} is deprecated", category=FutureWarning)

# How long a rank waits for others: the main rank alone trains a small CLIP, and data may stall.
PATIENCE = datetime.timedelta(hours=1)


def start(device_name):
    """Joins the process group if torchrun or another launcher started this process → the rank's device.

    device_name: "auto", "cpu", "cuda" or "cuda:N". Raises UserError for a device that does not exist, and if the other
    ranks cannot be reached.
    """
    # Float32 stays float32: by default, PyTorch lets cuDNN's convolutions round to TF32, which has 10 bits.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large tensors: on a CPU far fewer page faults
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[1-9]?\d)?", device_name):
        raise UserError(f"--device {device_name}: use auto, cpu, cuda or cuda:N")
    device = torch.device(device_name)
    launched = bool(os.environ.get("RANK"))
    if launched and not os.environ.get("LOCAL_RANK", "").isdecimal():  # else all ranks would take the first GPU
        raise UserError("RANK is set and LOCAL_RANK is not; start all ranks with torchrun, or unset RANK to run alone")
    if launched and device.index is not None:
        raise UserError(f"--device {device_name}: torchrun gives each rank its own GPU; use cuda or auto")
    if device.type == "cuda":
        index = int(os.environ["LOCAL_RANK"]) if launched else device.index or 0
        if index >= torch.cuda.device_count():
            found = f"there is no number {index}, as PyTorch finds {torch.cuda.device_count()} CUDA devices"
            raise UserError(f"--device {device_name}: {found}; use auto, or cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if launched:
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            advice = "start all of them with torchrun, or unset RANK to run alone"
            raise UserError(f"the other ranks cannot be joined: {first_line(error)}; {advice}") from error
    return device


def describe(device):
    """The name of a device, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


@contextlib.contextmanager
def ranks(device_name):
    """A context in which this process is one of the ranks; gives the rank's device. The error that a lost rank causes
    here becomes a UserError.

    Ranks leave their group together. After an error of this rank alone it does not wait for the others, so that the
    process ends, and torchrun notices.
    """
    device = start(device_name)
    try:
        yield device
    except (UserError, SystemExit):  # of all ranks: see `together`, and stopping.Stopped
        leave()
        raise
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise UserError(
            "another rank was lost; torchrun --max-restarts 3 starts all of them again, and the run resumes from its "
            "last checkpoint"
        ) from error
    leave()


def leave():
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        gc.collect()  # reference cycles in DistributedDataParallel keep the group alive
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def say(message):
    """Prints a line above a progress bar, on the main rank alone."""
    if is_main():
        tqdm.write(message)


def gather(x):
    """Concatenates x [B, …] over ranks, in their order. Each rank gets the sum of all ranks' gradients."""
    return torch.cat(all_gather(x.contiguous())) if world_size() > 1 else x


def mean(x):
    """The mean of a tensor over ranks, without gradient."""
    if dist.is_initialized():
        x = x.detach().clone()
        dist.all_reduce(x)
        x /= world_size()
    return x.detach()


def broadcast(value):
    """→ the main rank's value, on every rank. It must be picklable."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def collect(value):
    """→ a list of all ranks' values, on every rank. They must be picklable."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def anywhere(condition):
    """Whether a condition is true on any rank."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return bool(mean(torch.tensor(float(condition), device="cuda" if on_gpu else "cpu")))


@contextlib.contextmanager
def together():
    """If a rank raises a UserError, all ranks raise it: the main one with the message, the others without."""
    own = None
    try:
        yield
    except UserError as error:
        own = error
    if anywhere(own is not None):
        messages = collect(str(own or ""))
        raise UserError(next(filter(None, messages)) if is_main() else "") from own
