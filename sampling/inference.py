"""Makes a trained generator ready to sample: computes once what depends on weights alone, and may use bfloat16."""

import contextlib
import ctypes

import torch

from modulation import ModulatedConv2d

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

LARGE = 50_000_000  # parameters


def dtype_of(name, device):
    """The dtype called "fp32", "bf16", or "auto": bfloat16 if the device multiplies it faster than float32."""
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return DTYPES[name if name != "auto" else "bf16" if fast else "fp32"]


def sampling_dtype(name, generator):
    """Like dtype_of, for sampling: "auto" uses bfloat16 for large generators only.

    A small one is no faster at batch 1 (14.6 ms, and 14.5 in float32, on a CPU), and rounding visibly changes the
    pictures if a few points go to other experts.
    """
    large = sum(parameter.numel() for parameter in generator.parameters()) >= LARGE
    return dtype_of(name if name != "auto" or large else "fp32", generator.w_avg.device)


def prepare(generator, dtype=torch.float32):
    """Freezes a Generator, in place, and stores the synthesis network's weights in `dtype` → the generator.

    Call its synthesis within autocast(). Routers, styles, biases, to-RGBs, Fourier features, the text head and
    the mapping stay in float32: rounding them would change the pictures and save little time.
    """
    keep_freed_memory()
    generator.eval().requires_grad_(False)
    for module in generator.modules():
        if isinstance(module, ModulatedConv2d):
            module.cached_products = module.kernel_products()  # in full precision; the weights no longer change
    store(generator.synthesis, dtype)
    return generator


def keep_freed_memory():
    """Lets glibc keep the memory of freed tensors. By default it returns large blocks to the system, which fills new
    ones with zeros: a tenth of the time to sample 8 pictures of the demo on a CPU. No effect with other C libraries.
    """
    mmap_max, trim_threshold = -4, -1  # of malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def store(module, dtype):
    """Converts the weights of a module and its submodules, except those that must stay in float32."""
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
