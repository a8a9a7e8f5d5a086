"""Makes a trained generator ready to sample: what never changes is computed once, and weights may be bfloat16."""

import torch

from layers import Float32, ModulatedConv2d

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def prepare(generator, dtype=torch.float32, compiled=False):
    """Freezes a Generator, in place, stores its weights in `dtype`, and computes in that from now on → the generator.

    Routers, mapping, styles and biases stay in float32: rounding there would change what is drawn, and saves nothing.
    compiled: whether torch.compile takes the synthesis network, at its first call, which then takes minutes.
    """
    generator.eval().requires_grad_(False)
    for module in generator.modules():
        if isinstance(module, ModulatedConv2d):
            module.freeze()
    store(generator, dtype)
    autocast = torch.autocast(generator.w_avg.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    for network in (generator.text_head, generator.synthesis):
        network.forward = autocast(network.forward)
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
