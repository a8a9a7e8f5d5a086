"""Makes a trained generator ready to sample: what never changes is computed once, and weights may be bfloat16."""

import torch

from layers import Float32, ModulatedConv2d

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def prepare(generator, dtype=torch.float32):
    """Freezes a Generator, in place, and stores its weights in `dtype`; then call it within autocast(device, dtype).

    Routers, mapping, styles and biases stay in float32: rounding there would change what is drawn, and saves nothing.
    """
    generator.eval().requires_grad_(False)
    for module in generator.modules():
        if isinstance(module, ModulatedConv2d):
            module.freeze()
    _store(generator, dtype)
    return generator


def _store(module, dtype):
    if isinstance(module, Float32):
        return
    for parameter in module.parameters(recurse=False):
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype)
    for child in module.children():
        _store(child, dtype)


def autocast(device, dtype):
    """The context in which a generator stored in `dtype` computes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
