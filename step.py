"""One step of Aurora's training: the discriminator learns, then the generator, then the moving average follows.

This file knows nothing of files, progress or signals: training/loop.py repeats the step, and training/plan.py measures
its memory and its operators.
"""

import contextlib
import functools
import gc
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from augment import NUM_CHANCES, augment
from clip import Text
from common import distributed
from discriminator import Discriminator
from experts import routed_experts
from layers import full_precision, parameter_groups, pyramid
from losses import (
    R1_INTERVAL,
    DiscriminatorLoss,
    feature_maps,
    generator_loss,
    last_prediction,
    r1_penalty,
    scale_weights,
    wrong_captions,
)
from presets import fitted_to
from training.cuda_graph import Graphed
from upsampler import crop, distort, draw_distortions, draw_input_noise, given_images, new_generator

NETWORKS = ("generator", "discriminator", "ema")
OPTIMIZERS = ("optimizer_g", "optimizer_d")


class MicroBatch(NamedTuple):
    """This rank's share of the global batch, or a part of its share if gradients are accumulated."""

    real: dict[int, torch.Tensor]  # the pyramid of the images
    text: Text  # of their captions
    wrong: torch.Tensor  # [b], from wrong_captions: indices into the captions of this micro-batch on all ranks
    z: torch.Tensor  # [b, z_dim]
    chances: torch.Tensor  # [b, 2, NUM_CHANCES], for the augmentation of real images and of fake ones
    given: tuple[torch.Tensor, ...]  # for the second stage: the small images, and noise of their shape; () for the base


class Learner:
    """Everything that a step changes: both networks, their optimizers, and the moving average of the generator.

    preset: a presets.Preset. clip: the frozen CLIP. dtype: of matrix products, under autocast. batch: images of a step,
    over all ranks. perceptual: the frozen network of the recipe's perceptual loss, if it has one.
    """

    def __init__(self, preset, clip, device, dtype, batch, perceptual=None):
        preset = fitted_to(preset, clip)
        self.recipe, self.clip, self.device, self.dtype, self.batch = preset.recipe, clip, device, dtype, batch
        self.perceptual, self.resolutions = perceptual, preset.generator.resolutions
        with device:
            self.generator, self.discriminator = new_generator(preset.generator), Discriminator(preset.discriminator)
            self.ema = new_generator(preset.generator).eval().requires_grad_(False)
        self.ema.load_state_dict(self.generator.state_dict())
        self.generator.synthesis.recompute = self.recipe.recompute
        self.optimizer_g = adam(self.generator, self.recipe.lr_generator, self.recipe.momentum_generator)
        self.optimizer_d = adam(self.discriminator, self.recipe.lr_discriminator)
        self.learn_at(self.resolutions)

    def learn_at(self, active):
        """Makes only the parameters of the active resolutions learn: DDP would wait for gradients of the others."""
        self.active = active
        for level in self.generator.synthesis.levels:
            level.requires_grad_(level.resolution <= active[-1])
        for modules in (self.discriminator.stages, self.discriminator.heads):
            for resolution in self.discriminator.resolutions:
                modules[str(resolution)].requires_grad_(resolution <= active[-1])
        self.forget()

    def forget(self):
        """Drops the DDP wrappers and the recorded graph, which functools.cached_property keeps in vars(self); the next
        step builds them again. Needed whenever resolutions, learning rates or optimizer states change.
        """
        for name in ("parallel_generator", "discriminator_loss", "updater"):
            vars(self).pop(name, None)
        for name in OPTIMIZERS:
            getattr(self, name).zero_grad(set_to_none=True)  # gradients are views of DDP's buckets
        gc.collect()  # frees DDP's buckets and recorded graphs before new ones are built

    @functools.cached_property
    def parallel_generator(self):
        return self.parallel(self.generator)

    @functools.cached_property
    def discriminator_loss(self):
        return self.parallel(DiscriminatorLoss(self.discriminator, self.clip, self.recipe))

    @functools.cached_property
    def updater(self):
        """→ a function: update_networks, or a CUDA graph of it.

        Large networks, those that recompute, need no graph: they keep a GPU busy, and have no memory to spare. Without
        Triton the experts wait for the device, which a graph cannot record. With several ranks we record none, because
        we had no two GPUs to test whether a graph can replay NCCL's messages.
        """
        alone = self.device.type == "cuda" and distributed.world_size() == 1
        recorded = alone and routed_experts and not self.recipe.recompute
        r1_weights = 0, R1_INTERVAL  # one graph for each
        return Graphed(self.update_networks, r1_weights) if recorded else self.update_networks

    def parallel(self, module):
        if distributed.world_size() == 1:
            return module
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            module, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    # ------------------------------------------------------------------------------------------------------------------

    def prepare(self, seed, number, batches):
        """This rank's batches of step `number` → a list of MicroBatch.

        The random numbers depend only on the seed and the step's number. They are drawn for the global batch, and each
        rank uses its share, cut as sources.loader cuts the images: for the same images a step is the same on any number
        of ranks. The exception is clip_lower_every, which picks every n-th image of each rank.
        """
        config, rng = self.generator.config, rng_of(seed, number)
        z = torch.randn(self.batch, config.z_dim, generator=rng)
        chances = torch.rand(self.batch, 2, NUM_CHANCES, generator=rng)  # for real images, and for fake ones
        noise = draw_input_noise(config, self.batch, rng)
        distortions = draw_distortions(config, self.batch, rng)
        places = torch.rand(self.batch, 2, generator=rng)  # y, x of the crops
        shape = len(batches), distributed.world_size(), -1
        # Each [micro-batches, ranks, b, …]; the loader cuts the images in the same order.
        drawn = [x.unflatten(0, shape) for x in (z, chances, noise, distortions, places)]
        mine = [x[:, distributed.rank()] for x in drawn]  # of each micro-batch, this rank's images
        return [self.micro_batch(*parts) for parts in zip(batches, *mine, strict=True)]

    def micro_batch(self, batch, z, chances, noise, distortions, places):
        """A data.sources.Batch and its random numbers, on the CPU → MicroBatch. places [b, 2]: of the crops."""
        moved = batch.images, z, chances, noise, distortions  # upsampler.crop reads the places on the CPU
        images, z, chances, noise, distortions = (x.to(self.device) for x in moved)
        real, config = pyramid(images, self.active), self.generator.config
        given = given_images(config, images, noise)
        if given:  # the second stage
            small, noise = given
            given = distort(small, distortions, config), noise
            if self.recipe.crop:
                cut = config.input_resolution, self.recipe.crop, places
                real = {r: crop(x, *cut) for r, x in real.items()}
                given = tuple(crop(x, *cut) for x in given)
        ids = distributed.gather(self.clip.tokenize(batch.captions))
        wrong = wrong_captions(ids)  # indices among the captions of all ranks
        wrong = wrong.unflatten(0, (distributed.world_size(), -1))[distributed.rank()]
        text = self.clip.read(batch.captions)
        return MicroBatch(real, text, wrong, z=z, chances=chances, given=given)

    def step(self, number, micro_batches):
        """One step of both networks → {name: scalar}. `rejected` counts updates skipped for non-finite gradients."""
        report, w = self.updater(micro_batches, R1_INTERVAL if number % R1_INTERVAL == 0 else 0)
        self.update_ema(number, w)
        return report

    def update_networks(self, micro_batches, r1_weight):
        """A step without the moving average → its report, and the mean of w, [w_dim].

        r1_weight: the factor of R1: 0, or R1_INTERVAL, because the other steps go without it.

        Both networks learn from the same images, so these are drawn once. With several micro-batches they are drawn
        twice: keeping the graphs of all would take the memory that micro-batches are to save.
        """
        report, adversarial = {}, self.recipe.adversarial_weight > 0
        self.optimizer_d.zero_grad(set_to_none=True)  # here, because R1 adds its gradients first
        if adversarial and r1_weight:
            report["r1"] = self.penalize(micro_batches, r1_weight)
        # Several micro-batches keep no graph here; generator_step draws them again, with one.
        with torch.set_grad_enabled(len(micro_batches) == 1):
            outputs = [self.draw(batch) for batch in micro_batches]
        d_report = self.discriminator_step(micro_batches, outputs) if adversarial else {"rejected": 0}
        with frozen(self.discriminator):
            g_report = self.generator_step(micro_batches, outputs)
        report |= d_report | g_report
        report["rejected"] = d_report["rejected"] + g_report["rejected"]
        report["expert_min_share"] = torch.stack([least_share(output) for output in outputs]).min()
        w = torch.stack([full_precision(output.w.detach()).mean(0) for output in outputs]).mean(0)
        return report, w

    def draw(self, batch):
        """The generator's Output for a MicroBatch."""
        with self.autocast():
            return self.parallel_generator(*batch.given, batch.z, batch.text.tokens, batch.text.eot, self.active[-1])

    def penalize(self, micro_batches, r1_weight):
        """Adds the gradients of R1, times r1_weight, to the discriminator's → R1.

        R1 takes several times the memory of the other losses, and images of different groups do not affect each other's
        penalties. So large networks, those that recompute, process half of a micro-batch at a time. R1 comes first,
        while no other graph is in memory. It bypasses the DDP wrapper, so its gradients stay in .grad. The
        backward pass of discriminator_step adds to them, and DDP then averages the sums.
        """
        scales, total = scale_weights(micro_batches[0].real, self.recipe.lower_scales), 0
        for batch in micro_batches:
            real, size = augment(batch.real, self.recipe.augment, batch.chances[:, 0]), len(batch.text.eot)
            group = self.discriminator.group
            at_once = -(-size // (2 * group)) * group if self.recipe.recompute else size
            for first in range(0, size, at_once):
                some = slice(first, first + at_once)
                some_real = {r: x[some] for r, x in real.items()}
                tokens, eot = batch.text.tokens[some], batch.text.eot[some]
                r1 = r1_penalty(self.discriminator, self.clip, some_real, tokens, eot, self.recipe.r1_gamma, scales)
                r1 = r1 * len(eot) / (len(micro_batches) * size)  # from these images' mean to a mean over all
                (r1_weight * r1).backward()
                total += r1.detach()
        return total

    def discriminator_step(self, micro_batches, outputs):
        reports = []
        for batch, output in zip(micro_batches, outputs, strict=True):
            fake = {r: image.detach() for r, image in output.pyramid.items()}
            with averaging(self.discriminator_loss, batch is micro_batches[-1]):
                with self.autocast():
                    report = self.discriminator_loss(batch.real, fake, batch.text, batch.wrong, batch.chances)
                (report["loss"] / len(micro_batches)).backward()
            reports.append(report)
        means = step_optimizer(self.optimizer_d, reports, "d")
        return {"d_loss": mean_of(reports, "loss"), **means}

    def generator_step(self, micro_batches, outputs):
        self.optimizer_g.zero_grad(set_to_none=True)
        reports = []
        for batch, output in zip(micro_batches, outputs, strict=True):
            with averaging(self.parallel_generator, batch is micro_batches[-1]):
                if len(micro_batches) > 1:  # the outputs have no graph
                    output = self.draw(batch)
                with self.autocast():
                    report = generator_loss(
                        output, batch.text, batch.wrong, batch.chances[:, 1], self.discriminator, self.clip,
                        self.recipe, real=batch.real, perceptual=self.perceptual,
                    )  # fmt: skip
                (report["loss"] / len(micro_batches)).backward()
            reports.append(report)
        means = step_optimizer(self.optimizer_g, reports, "g")
        return {"g_loss": mean_of(reports, "loss"), **means}

    def score(self, pyramid, text):
        """The mean over points of the last prediction for the highest images of a pyramid with their captions, [B]."""
        with self.autocast():
            code = self.discriminator.encode_text(text.tokens, text.eot)
            logits = self.discriminator.score(feature_maps(self.discriminator, self.clip, pyramid), code)
        return last_prediction(logits).mean(1)

    def autocast(self):
        """bfloat16 for matrix products, CLIP's image tower included. Routing, demodulation, distances and R1 stay in
        float32, and so does the text encoder, which runs outside of this context.
        """
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @torch.no_grad()
    def update_ema(self, number, w):
        """Moves the moving average. w: the mean of this step's latent codes, [w_dim]."""
        self.generator.update_w_avg(distributed.mean(w))
        weight = ema_weight(number, self.batch, self.recipe.ema_half_life)
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.generator.parameters()), weight)
        self.ema.w_avg.copy_(self.generator.w_avg)

    # ------------------------------------------------------------------------------------------------------------------

    def state_dict(self):
        return {"clip": self.clip.name} | {name: getattr(self, name).state_dict() for name in (*NETWORKS, *OPTIMIZERS)}

    def load_state_dict(self, state):
        """Loads a state_dict, but keeps the recipe's learning rates and momentum: a run whose losses were not finite
        can be resumed with lower ones.
        """
        if state["clip"] != self.clip.name:
            raise ValueError(f"it learned with {state['clip']}, and its file is now {self.clip.name}; restore the file")
        for name in NETWORKS:
            getattr(self, name).load_state_dict(state[name])
        for name in OPTIMIZERS:
            optimizer = getattr(self, name)
            own = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state[name]["state"], "param_groups": own})
            for averages in optimizer.state.values():  # copied, because on a CPU they are still in the file
                averages.update({key: value.clone() for key, value in averages.items()})
        self.forget()

    def load_weights(self, weights):
        """Loads weights of some networks, {name: state dict} → what was missing, in words; it stays as initialized.

        A generator may have fewer levels than this one. Raises RuntimeError for other shapes or more layers.
        """
        missing = [name for name in NETWORKS if name not in weights]
        for name in NETWORKS:
            if name in weights:
                lost = getattr(self, name).load_state_dict(weights[name], strict=False)
                if lost.unexpected_keys:
                    raise RuntimeError(f"{name} has no {lost.unexpected_keys[0]}")
                missing += [f"{len(lost.missing_keys)} tensors of {name}"] if lost.missing_keys else []
        return missing

    def weights_are_finite(self):
        return all(p.isfinite().all() for name in NETWORKS for p in getattr(self, name).parameters())


def ema_weight(number, batch, half_life):
    """The weight of step `number`'s parameters in their moving average. half_life: in images.

    The half-life is at most a twentieth of the images seen. Otherwise the average would remember the initial weights.
    So a run that starts from other weights also begins its average anew.
    """
    return 1 - 0.5 ** (batch / max(1e-8, min(half_life, 0.05 * (number + 1) * batch)))


def rng_of(*numbers):
    """A torch.Generator on the CPU, seeded by a run's seed and a step's number, which are hashed to its 32 bits."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def adam(network, lr, momentum=0.0):
    """capturable: a CUDA graph can record its step. The graph also keeps the learning rates: after changing them, call
    Learner.forget(). docs/extend.md shows a schedule.
    """
    on_gpu = next(network.parameters()).is_cuda
    return torch.optim.Adam(parameter_groups(network, lr), betas=(momentum, 0.99), fused=True, capturable=on_gpu)


def step_optimizer(optimizer, reports, prefix):
    """One step of an optimizer, after backward → the means of the reports, the gradients' norm, `rejected`.

    If a gradient is not finite, the weights do not change; DDP has averaged the gradients, so this is so on all ranks.
    The device decides it, so the host need not wait: fused Adam reads found_inf, which torch.amp's GradScaler sets
    otherwise.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
    optimizer.step()
    means = {name: mean_of(reports, name) for name in reports[0] if name != "loss"}
    return {**means, f"{prefix}_grad_norm": norm, "rejected": optimizer.found_inf}


def least_share(output):
    """The smallest number of points that any expert of any router got in this batch, as a share of the mean; 1 if all
    got the same, or if there is no router.
    """
    shares = [output.w.new_ones(())]
    for routing in output.routings.values():
        num_experts = routing.logits.shape[-1]
        points = F.one_hot(routing.expert_index, num_experts).sum((0, 1)).float()  # [E]
        shares.append(points.min() / points.mean())
    return torch.stack(shares).min()


def mean_of(reports, name):
    return torch.stack([report[name].detach().float() for report in reports]).mean()


def averaging(module, is_last):
    """A context in which DDP averages gradients over ranks only for the last micro-batch."""
    if is_last or not isinstance(module, DistributedDataParallel):
        return contextlib.nullcontext()
    return module.no_sync()


@contextlib.contextmanager
def frozen(module):
    """A context in which gradients pass through a module, but its parameters get none."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
