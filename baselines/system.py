"""What the adversarial systems of this folder share: their networks and optimizers, the moving average, sampling."""

import copy

import torch

from clip import Text
from common import distributed
from layers import parameter_groups
from step import ema_weight

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
        self.clip, self.resolution, self.device = clip, resolution, device
        ema = copy.deepcopy(generator).eval().requires_grad_(False)
        self.networks = {"generator": generator, "discriminator": discriminator, "ema": ema}
        self.networks = {name: network.to(device) for name, network in self.networks.items()}
        self.optimizers = {
            name: torch.optim.Adam(parameter_groups(self.networks[name], lr), betas=betas)
            for name in ("generator", "discriminator")
        }

    def sample_z(self, count, noise):
        """z ~ N(0, 1), [count, z_dim]."""
        return torch.randn(count, self.networks["generator"].z_dim, generator=noise).to(self.device)

    def sample(self, text, seed, count, truncation=1.0):
        """`count` images for each of P captions, one caption after the other: [P · count, 3, R, R] in [−1, 1]."""
        text = Text(*(x.repeat_interleave(count, dim=0) for x in text))
        z = self.sample_z(len(text.embedding), torch.Generator().manual_seed(seed))
        return self.draw(z, text, truncation)


@torch.no_grad()
def update_average(average, network, number, batch, half_life):
    """Moves a moving average toward a network, as step.py does Aurora's. Buffers are copied. batch: of this rank."""
    weight = ema_weight(number, batch * distributed.world_size(), half_life)
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), weight)
    for own, buffer in zip(average.buffers(), network.buffers(), strict=True):
        own.copy_(buffer)


def minimize(optimizer, loss):
    """One step of an optimizer down a loss. Only its own parameters get gradients, the means over all ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=parameters)
    distributed.average_gradients(parameters)
    optimizer.step()
