"""From authors' weights to ours: other names, other shapes of the same numbers, weights at the scale of their use."""

import contextlib
import re

import torch


@contextlib.contextmanager
def reading(what):
    """Raises ValueError, in one line, where a state dict turns out not to be what it is read as."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[-200:]
        raise ValueError(f"this is not the authors' state of {what}, or not all of it: … {reason}") from error


def renamed(state, renames):
    """The authors' tensors or arrays under our names, in float32.

    renames: regular expressions and what replaces them, applied in order to every name; what becomes "" is left out.
    """
    translated = {}
    for name, value in state.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name:
            translated[name] = torch.as_tensor(value).float()
    return translated


def fitted(translated, network):
    """Tensors under our names, in the shapes of a network's, which may differ by sides of 1, and at their scale."""
    ours, state = network.state_dict(), dict(translated)
    for name, value in state.items():
        if name in ours and value.squeeze().shape == ours[name].squeeze().shape:
            state[name] = value.reshape(ours[name].shape)
    for prefix, module in network.named_modules():
        for name, scale in getattr(module, "lr_scale", {}).items():  # they multiply weights by this when they use them
            if (name := f"{prefix}.{name}") in state:  # a layer without bias still has the bias's scale
                state[name] = state[name] * scale
    return state


def load_renamed(network, state, renames):
    """Puts the authors' tensors into a network, see above → it, in eval mode."""
    network.load_state_dict(fitted(renamed(state, renames), network))
    return network.eval()
