"""Makes a trained generator ready to sample: what never changes is computed once, and weights may be bfloat16."""

import torch

from layers import Float32, ModulatedConv2d

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dtype_of(name, device):
    """The dtype called "fp32", "bf16", or "auto": bfloat16 where the device multiplies it faster than float32."""
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return DTYPES[name if name != "auto" else "bf16" if fast else "fp32"]


def prepare(generator, dtype=torch.float32, compiled=False):
    """Freezes a Generator, in place, and stores the synthesis network's weights in `dtype` → the generator.

    Its synthesis is then called within autocast(). Routers, styles and biases stay in float32, and so do text head and
    mapping, which are run once: rounding there would change what is drawn, and save little.
    compiled: whether torch.compile takes the synthesis network, at its first call, which then takes minutes.
    """
    generator.eval().requires_grad_(False)
    for module in generator.modules():
        if isinstance(module, ModulatedConv2d):
            module.freeze()
    store(generator.synthesis, dtype)
    if compiled:
        generator.synthesis.compile(dynamic=False)
    return generator


def store(module, dtype):
    """Converts the weights of a module and of all in it, but for those that must stay in float32."""
    if isinstance(module, Float32):
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
