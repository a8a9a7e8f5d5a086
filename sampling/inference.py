"""Makes a trained generator ready to sample: what never changes is computed once, and weights may be bfloat16."""

import contextlib

import torch

from common.cli import UserError, first_line
from modulation import ModulatedConv2d, UpsamplingConv2d

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

LARGE = 50_000_000  # parameters


def dtype_of(name, device):
    """The dtype called "fp32", "bf16", or "auto": bfloat16 where the device multiplies it faster than float32."""
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return DTYPES[name if name != "auto" else "bf16" if fast else "fp32"]


def sampling_dtype(name, generator):
    """As dtype_of, for sampling: "auto" takes bfloat16 for large generators only.

    A small one gains nothing at batch 1 (14.6 ms for 14.5 on a CPU), and a few points that go to other experts show.
    """
    large = sum(parameter.numel() for parameter in generator.parameters()) >= LARGE
    return dtype_of(name if name != "auto" or large else "fp32", generator.w_avg.device)


def prepare(generator, dtype=torch.float32, compiled=False):
    """Freezes a Generator, in place, and stores the synthesis network's weights in `dtype` → the generator.

    Its synthesis is then called within autocast(). Routers, styles and biases stay in float32, and so do text head and
    mapping, which are run once: rounding there would change what is drawn, and save little.
    compiled: whether torch.compile takes the synthesis network, at its first call, which then takes minutes.
    """
    generator.eval().requires_grad_(False)
    for module in generator.modules():
        if isinstance(module, ModulatedConv2d):
            freeze(module)
    store(generator.synthesis, dtype)
    if compiled:
        generator.synthesis.compile(dynamic=False)
    return generator


@contextlib.contextmanager
def compiling():
    """Where torch.compile fails at a first call, as it does without a compiler, a UserError says so."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        raise UserError(
            f"--compile failed ({first_line(error)}); it needs a C++ compiler, as g++ in the PATH; without --compile "
            "the pictures are the same"
        ) from error


@torch.no_grad()
def freeze(module):
    """Computes once what a ModulatedConv2d computes from its weights alone, which must not change after that."""
    module.products = module.kernel_products()
    if isinstance(module, UpsamplingConv2d) and module.kernel_mix is None:
        module.weight.data = module.weight.data.movedim(2, -1).contiguous().movedim(-1, 2)  # in the order it is read in


def store(module, dtype):
    """Converts the weights of a module and of all in it, but for those that must stay in float32."""
    if getattr(module.forward, "in_float32", False):
        return
    for parameter in module.parameters(recurse=False):
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype)
    for child in module.children():
        store(child, dtype)


def autocast(generator):
    """The context in which a generator's synthesis computes in the dtype that its weights are stored in."""
    narrow = any(parameter.dtype == torch.bfloat16 for parameter in generator.synthesis.parameters())
    return torch.autocast(generator.w_avg.device.type, torch.bfloat16, enabled=narrow)
