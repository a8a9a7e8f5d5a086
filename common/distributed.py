"""The few calls to torch.distributed, each of which does the obvious thing in a single process too."""

import contextlib
import datetime
import gc
import os
import platform
import warnings

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather
from tqdm import tqdm

from common.cli import UserError, first_line

# Their successors are not in every PyTorch since 2.8; open_clip's loss calls the first as well.
for name in ("all_gather", "`broadcast_buffers`"):
    warnings.filterwarnings("ignore", message=f".*{name} is deprecated", category=FutureWarning)

# How long a rank waits for others: the main one makes the plan or trains a small CLIP alone, and data may stall.
PATIENCE = datetime.timedelta(hours=1)
# What torchrun sets in the environment of each rank.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start(device_name):
    """Joins the process group where torchrun, or another launcher, started us, and returns this rank's device.

    device_name: "auto", "cpu", "cuda" or "cuda:N". Raises UserError for a device that is not there, and where the other
    ranks cannot be joined.
    """
    # Float32 is float32 from here on. PyTorch's default lets cuDNN's convolutions round to TF32, to 10 bits.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large tensors: on a CPU far fewer page faults
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device_name)
    except RuntimeError:
        raise UserError(f"--device {device_name}: use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device_name}: use auto, cpu, cuda or cuda:N")
    launched = is_launched()
    if device.type == "cuda":
        index = int(os.environ["LOCAL_RANK"]) if launched else device.index or 0
        if index >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            asked = f"--device {device_name}: number {index} was asked for"
            raise UserError(f"{asked}, and PyTorch finds {found} CUDA devices; use auto, or cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if launched:
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            address = os.environ["MASTER_ADDR"]
            raise UserError(f"the other ranks cannot be joined at {address}: {first_line(error)}") from error
    return device


def is_launched():
    """Whether a launcher made this process one of several ranks. Raises UserError where what it told is not enough."""
    told = {name: os.environ.get(name, "") for name in RANK_VARIABLES}
    if not told["RANK"] and not told["WORLD_SIZE"]:
        return False
    try:
        numbers = [int(told[name]) for name in RANK_VARIABLES if name != "MASTER_ADDR"]
        complete = 0 <= numbers[0] < numbers[1] and told["MASTER_ADDR"]
    except ValueError:
        complete = False
    if not complete:
        shown = ", ".join(f"{name}={value}" if value else f"no {name}" for name, value in told.items())
        raise UserError(
            f"the environment has {shown}, which does not say where the other ranks are: start all of them by "
            "torchrun, or unset RANK and WORLD_SIZE to run alone"
        )
    return True


def describe(device):
    """What a device is, as people name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def stop():
    if dist.is_initialized():
        gc.collect()  # DistributedDataParallel holds the group, in cycles, and must be gone before it
        dist.destroy_process_group()


@contextlib.contextmanager
def lost_ranks_reported():
    """Where another rank died, what its silence raises here becomes a UserError."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise UserError(
            "another rank was lost; torchrun --max-restarts 3 starts all of them again, and the run goes on from its "
            "last checkpoint"
        ) from error


@contextlib.contextmanager
def alone():
    """A context in which this process takes no notice of other ranks: the main one rehearses a step for all."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


_alone = False


def has_ranks():
    """Whether there are ranks to speak with."""
    return dist.is_initialized() and not _alone


def rank():
    return dist.get_rank() if has_ranks() else 0


def world_size():
    return dist.get_world_size() if has_ranks() else 1


def is_main():
    return rank() == 0


def say(message):
    """Prints a line, on the main rank alone, above a progress bar."""
    if is_main():
        tqdm.write(message)


def gather(x):
    """Concatenates x [B, …] over ranks, in their order. Gradients flow back to every rank and sum there."""
    return torch.cat(all_gather(x.contiguous())) if has_ranks() else x


def mean(x):
    """The mean of a tensor over ranks, without gradient."""
    if has_ranks():
        x = x.detach().clone()
        dist.all_reduce(x)
        x /= world_size()
    return x.detach()


def average_gradients(parameters):
    """Replaces the gradients of parameters by their means over ranks, by one message: DDP in the simplest form."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if has_ranks():
        means = mean(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, means.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def broadcast(value):
    """The main rank's value, any that can be pickled, on every rank."""
    values = [value]
    if has_ranks():
        dist.broadcast_object_list(values)
    return values[0]


def collect(value):
    """Every rank's value, any that can be pickled, in their order, on every rank."""
    values = [value] * world_size()
    if has_ranks():
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def together():
    """A UserError that one rank meets ends all of them. The main one tells it; the others raise it without words."""
    met = None
    try:
        yield
    except UserError as error:
        if not has_ranks():
            raise
        met = error
    if not has_ranks():
        return
    failed = torch.tensor(float(met is not None), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if failed:
        messages = collect(str(met or ""))
        raise UserError(next(filter(None, messages)) if is_main() else "")
