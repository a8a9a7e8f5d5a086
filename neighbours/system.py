"""What the adversarial systems of this folder share: their networks and optimizers, the moving average, sampling, and
the reading of their authors' weights.
"""

import contextlib
import copy
import re

import torch

from clip import Text
from common import distributed
from common.cli import UserError
from layers import parameter_groups
from training.step import ema_weight

RESOLUTIONS = (32, 64)


class System:
    """A generator and a discriminator as a run trains them. A subclass says how, in `step`, and draws, in `draw`.

    networks: generator, discriminator and ema, the moving average of the generator; optimizers: of the first two. The
    run saves and restores both by name. clip, a FrozenClip, never changes and is not among them.

    step(number, images, text, noise): one step of both networks and of the moving average, by the number-th batch:
    images [B, 3, R, R] in [−1, 1], the clip.Text of their captions, and a torch.Generator on the CPU, from which all
    that is random comes. → {name: scalar}
    draw(z, text, truncation): z [B, z_dim] and the clip.Text of B captions → images [B, 3, R, R] in [−1, 1], by the
    moving average.
    """

    for_sampling = ("ema",)  # the networks that drawing needs

    def __init__(self, clip, resolution, device, generator, discriminator, lr, betas):
        if resolution not in RESOLUTIONS:
            raise UserError(f"resolution {resolution}: {type(self).__name__} draws at 32 or 64")
        self.clip, self.resolution, self.device = clip, resolution, device
        ema = copy.deepcopy(generator).eval().requires_grad_(False)
        self.networks = {"generator": generator, "discriminator": discriminator, "ema": ema}
        self.networks = {name: network.to(device) for name, network in self.networks.items()}
        self.optimizers = {
            name: torch.optim.Adam(parameter_groups(self.networks[name], lr), betas=betas)
            for name in ("generator", "discriminator")
        }

    def codes(self, count, noise):
        """z ~ N(0, 1), [count, z_dim]."""
        return torch.randn(count, self.networks["generator"].z_dim, generator=noise).to(self.device)

    @torch.no_grad()
    def update_ema(self, number, batch, half_life):
        """Moves the moving average toward the generator, as training/step.py does Aurora's. Buffers are copied."""
        ema, generator = self.networks["ema"], self.networks["generator"]
        weight = ema_weight(number, batch * distributed.world_size(), half_life)
        torch._foreach_lerp_(list(ema.parameters()), list(generator.parameters()), weight)
        for average, buffer in zip(ema.buffers(), generator.buffers(), strict=True):
            average.copy_(buffer)

    def sample(self, text, seed, count, truncation=1.0):
        """`count` images for each of P captions, one caption after the other: [P · count, 3, R, R] in [−1, 1]."""
        text = Text(*(x.repeat_interleave(count, dim=0) for x in text))
        z = self.codes(len(text.embedding), torch.Generator().manual_seed(seed))
        return self.draw(z, text, truncation)


def minimize(optimizer, loss):
    """One step of an optimizer down a loss. Only its own parameters get gradients, the means over all ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=parameters)
    distributed.average_gradients(parameters)
    optimizer.step()


@contextlib.contextmanager
def reading(what):
    """Raises ValueError, in one line, where a state dict turns out not to be what it is read as."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"this is not the authors' state of {what}, or not all of it: {reason}") from error


def load_renamed(network, state, renames):
    """Puts the authors' tensors into a network, under our names, in our shapes, at our scale → it, in eval mode.

    renames: regular expressions and what replaces them, applied in order to every name; what becomes "" is left out.
    """
    ours, translated = network.state_dict(), {}
    for name, value in state.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name:
            value = torch.as_tensor(value).float()
            same_numbers = name in ours and value.squeeze().shape == ours[name].squeeze().shape
            translated[name] = value.reshape(ours[name].shape) if same_numbers else value
    for prefix, module in network.named_modules():
        for name, scale in getattr(module, "lr_scale", {}).items():  # they multiply weights by this when they use them
            if (name := f"{prefix}.{name}") in translated:
                translated[name] = translated[name] * scale
    network.load_state_dict(translated)
    return network.eval()
