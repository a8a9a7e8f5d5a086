"""Every loss of Aurora, in the paper's order: adversarial, matching-aware, R1, multi-level CLIP, mixture of experts.

A pyramid holds an image for each active resolution. The discriminator scores each image after every stage it passes.
`scales`, {resolution: weight}, says how much each image counts. Losses are means over a rank's images, CLIP's over the
global batch. Averaged over ranks, as DDP does, the gradients are those of the global batch.
"""

import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from augment import augment
from common import distributed
from discriminator import CLIP
from layers import float32_region, full_precision

R1_INTERVAL = 16  # R1 is computed in one step of 16, and counts 16 times there (StyleGAN2, section 4.1).
# Weights of every prediction but the last, relative to that one.
EARLY_ADVERSARIAL, EARLY_MATCHING = 0.01, 0.05
Z_LOSS_WEIGHT = 0.001  # the release's
SEEN_BY_CLIP = 64  # Of images above this resolution, which look alike to it, CLIP is shown the largest alone.


def scale_weights(resolutions, lower):
    """{resolution: weight}: `lower` for each but the highest, relative to that one; they sum to one."""
    weights = {r: 1 if r == max(resolutions) else lower for r in resolutions}
    return {r: weight / sum(weights.values()) for r, weight in weights.items()}


def prediction_weights(logits, early, scales):
    """{(input, stage): weight}: the image's weight, times `early` unless the stage is the last, or CLIP."""
    last = min(stage for _, stage in logits if stage != CLIP)  # the last stage has the lowest resolution
    return {(entered, stage): scales[entered] * (1 if stage in (last, CLIP) else early) for entered, stage in logits}


def last_prediction(logits):
    """Of the highest image after the last stage, [B, N]."""
    last = min(stage for _, stage in logits if stage != CLIP)
    return logits[max(image for image, _ in logits), last]


def logistic_loss(logits, sign, early, scales):
    """Σ weight · softplus(sign · D) over the predictions, per image: [B].

    logits: {(input, stage): [B, N]}. sign −1 wants them to look real, +1 fake, for all or [B, 1]: the non-saturating
    logistic loss.
    """
    weights = prediction_weights(logits, early, scales)
    return sum(weights[key] * F.softplus(sign * x).mean(1) for key, x in logits.items())


def wrong_captions(ids):
    """For each caption the index of the next one that differs from it, in a circle; its own if all are the same.

    ids: token ids [B, T] of a part's captions, over all ranks → indices [B].
    """
    batch, position = len(ids), torch.arange(len(ids), device=ids.device)
    differs = torch.cdist(ids.float(), ids.float(), p=0) > 0  # [B, B], without the host sync that unique needs
    steps = (position - position[:, None]) % batch  # [B, B]: how far caption j comes after caption i, 0 for itself
    steps = steps.masked_fill(~differs, batch + 1)
    steps.fill_diagonal_(batch)  # itself comes after all that differ
    return steps.argmin(1)


def feature_maps(discriminator, clip, pyramid):
    """Discriminator.maps of a pyramid. A vision-aided one also reads CLIP's maps of the highest image (GigaGAN, section
    3.4); that of the upsampler is not vision-aided (section 3.5 there).
    """
    return discriminator.maps(pyramid, clip.see(pyramid[max(pyramid)])[1] if discriminator.map_readers else ())


def r1_penalty(discriminator, clip, pyramid, tokens, eot, gamma, scales):
    """R1 (Mescheder et al. 2018) on real images with their captions, in float32: a scalar.

    For every image of the pyramid: its scale · γ_r/2 · ‖gradient of its predictions by its pixels‖², γ_r = gamma ·
    (r/64)². No image affects the predictions of another, so one backward pass gives all.
    """
    with float32_region(tokens), sdpa_kernel(SDPBackend.MATH):  # fused attention, as in CLIP, has no second derivative
        pyramid = {r: full_precision(x.detach()).requires_grad_() for r, x in pyramid.items()}
        code = discriminator.encode_text(full_precision(tokens), eot)
        logits = discriminator.score(feature_maps(discriminator, clip, pyramid), code)
        # Early predictions weigh less within the gradient; `scales` weigh its square.
        weights = prediction_weights(logits, EARLY_ADVERSARIAL, dict.fromkeys(pyramid, 1))
        score = sum(weights[key] * x.mean(1).sum() for key, x in logits.items())
        gradients = torch.autograd.grad(score, list(pyramid.values()), create_graph=True)
        norms = {r: g.square().sum((1, 2, 3)).mean() for r, g in zip(pyramid, gradients, strict=True)}
        return sum(scales[r] * gamma * (r / 64) ** 2 / 2 * norm for r, norm in norms.items())


def clip_loss(clip, embeddings, text_embedding, scales):
    """Symmetric InfoNCE over the global batch between captions and the images, at every resolution and weighed.

    embeddings: {resolution: CLIP's of the images [B, D]}, of any length. Gradients pass through the gather: else an
    image would learn from the captions of its own rank alone, and the step would depend on the number of ranks.
    """
    info_nce = open_clip.ClipLoss(
        gather_with_grad=True, rank=distributed.rank(), world_size=distributed.world_size(), cache_labels=False
    )
    with float32_region(text_embedding):  # the logits are multiplied by up to 100
        total = 0
        for r, embedding in embeddings.items():
            embedding = F.normalize(full_precision(embedding), dim=-1)
            total = total + scales[r] * info_nce(embedding, text_embedding, clip.logit_scale)
        return total


def z_loss(logits):
    """The mean over points of logsumexp(logits)², which keeps the logits [B, N, E] small (ST-MoE, equation 5)."""
    return logits.logsumexp(-1).square().mean()


def load_balancing_loss(logits, expert_index):
    """E·Σₑ fₑ·Pₑ per image, then the batch mean (Switch Transformer, equations 4 to 6); one when balanced.

    fₑ is the share of the image's points that expert e takes, Pₑ its mean probability over them.
    """
    assert expert_index.shape == logits.shape[:-1], "one expert a point; for top-k take the sum over the choices"
    num_experts = logits.shape[-1]
    share = F.one_hot(expert_index, num_experts).to(logits.dtype).mean(1)
    probability = logits.softmax(-1).mean(1)
    return num_experts * (share * probability).sum(-1).mean()


def mode_seeking_loss(first, second):
    """1 / mean |first − second| of images [B, 3, R, R] of the same captions under other z (Mao et al. 2019).

    The distance between the z, by which the authors divide, is nearly the same for all pairs, and left out.
    """
    return 1 / (full_precision(first - second).abs().mean() + 1e-3)


def perceptual_distance(maps, others):
    """Between the feature maps of images, each point's channels of unit length: LPIPS (Zhang et al. 2018) without its
    learned weights. Both: lists of [B, C, h, w]; → [B], in 0…4.
    """
    distances = []
    for a, b in zip(maps, others, strict=True):
        a, b = F.normalize(full_precision(a), dim=1), F.normalize(full_precision(b), dim=1)
        distances.append((a - b).square().sum(1).mean((1, 2)))
    return torch.stack(distances).mean(0)


def pixel_distance(pyramid, real, scales):
    """L1 between two pyramids, each resolution weighed: a scalar."""
    return sum(scales[r] * F.l1_loss(full_precision(image), real[r]) for r, image in pyramid.items())


def moe_loss(output, balance_weight):
    """Both losses of every router of an aurora.Output, weighed and summed: a scalar."""
    total = output.w.new_zeros(())  # where there is no router, as at 4×4
    for routing in output.routings.values():
        total = total + Z_LOSS_WEIGHT * z_loss(routing.logits)
        total = total + balance_weight * load_balancing_loss(routing.logits, routing.expert_index)
    return total


# ----------------------------------------------------------------------------------------------------------------------
# The two objectives. The discriminator's calls parts of the network (encode_text, maps, score), and DDP follows one
# forward: so it is a module, which DDP wraps. The generator's gets pictures that are drawn already.


class DiscriminatorLoss(nn.Module):
    """What the discriminator minimizes, but for R1, which step.py adds: adversarial + matching."""

    def __init__(self, discriminator, clip, recipe):
        super().__init__()
        self.discriminator, self.clip = discriminator, clip
        self.recipe = recipe

    def forward(self, real, fake, text, wrong, chances):
        """real, fake: pyramids. text: clip.Text of this rank's captions. wrong [B]: of wrong_captions, for these.

        chances [B, 2, …]: of the augmentation of the real images, and of the fake ones.
        → {name: scalar}, `loss` to be minimized.
        """
        d, batch, scales = self.discriminator, len(wrong), scale_weights(real, self.recipe.lower_scales)
        code = d.encode_text(text.tokens, text.eot)
        wrong_code, is_wrong = choose_wrong(code, wrong)
        real, fake = (augment(x, self.recipe.augment, chances[:, n]) for n, x in enumerate((real, fake)))

        maps = feature_maps(d, self.clip, {r: torch.cat([real[r], fake[r]]) for r in real})
        right_logits = d.score(maps, code.repeat(2, 1))
        wrong_logits = d.score(maps, wrong_code.repeat(2, 1))
        one = code.new_ones(batch, 1)
        sign = torch.cat([-one, one])  # real images are to look real, fake ones fake

        # Divided by half of the images: the mean over real ones plus the mean over fake ones.
        adversarial = logistic_loss(right_logits, sign, EARLY_ADVERSARIAL, scales).sum() / batch
        matching = (logistic_loss(wrong_logits, 1, EARLY_MATCHING, scales) * is_wrong.repeat(2)).sum() / batch
        loss = adversarial + self.recipe.matching_weight_discriminator * matching

        last = last_prediction(right_logits).detach()
        return {
            "loss": loss,
            "d_adversarial": adversarial,
            "d_matching": matching,
            "logits_real": last[:batch].mean(),
            "logits_fake": last[batch:].mean(),
            "logits_wrong": last_prediction(wrong_logits)[:batch].detach().mean(),
        }


def generator_loss(output, other, text, wrong, chances, discriminator, clip, recipe, real=None, perceptual=None):
    """What the generator minimizes: adversarial + matching + multi-level CLIP + mixture of experts + mode seeking; and
    for the upsampler, which is told what it should have made, the distance to that.

    output: aurora.Output for the captions of text; other: one of a low resolution, for the same captions and other z,
    or None where the recipe does not ask for it; wrong [B]: of wrong_captions, for these; chances [B, …] of the
    augmentation; the discriminator frozen as the clip is. For a recipe that compares with the truth, real: the pyramid
    of the true images; perceptual: a frozen network, from images [B, 3, R, R] to feature maps.
    → {name: scalar}, `loss` to be minimized.
    """
    scales = scale_weights(output.pyramid, recipe.lower_scales)
    seen = {r: image for r, image in output.pyramid.items() if r <= SEEN_BY_CLIP or r == max(output.pyramid)}
    embeddings, clip_maps = clip.see(*seen.values())  # all in one pass, the highest images last
    clip_maps = [x[-len(wrong) :] for x in clip_maps]
    embeddings = dict(zip(seen, embeddings.chunk(len(seen)), strict=True))
    losses = {
        "g_clip": clip_loss(clip, embeddings, text.embedding, scale_weights(seen, recipe.lower_scales)),
        "g_moe": moe_loss(output, recipe.balance_weight),
    }
    weights = {"g_clip": recipe.clip_weight, "g_moe": 1}
    if recipe.adversarial_weight:
        fooling = fooling_losses(output, text, wrong, chances, clip_maps, discriminator, clip, recipe)
        losses["g_adversarial"], losses["g_matching"] = fooling
        weights["g_adversarial"] = recipe.adversarial_weight
        weights["g_matching"] = recipe.adversarial_weight * recipe.matching_weight_generator
    if other is not None:
        r = max(other.pyramid)
        losses["g_mode_seeking"] = mode_seeking_loss(output.pyramid[r], other.pyramid[r])
        weights["g_mode_seeking"] = recipe.mode_seeking_weight
    if recipe.l1_weight:
        losses["g_l1"] = pixel_distance(output.pyramid, real, scales)
        weights["g_l1"] = recipe.l1_weight
    if recipe.perceptual_weight:
        with torch.no_grad():
            wanted = perceptual(real[max(real)])
        losses["g_perceptual"] = perceptual_distance(perceptual(output.image), wanted).mean()
        weights["g_perceptual"] = recipe.perceptual_weight
    return losses | {"loss": sum(weights[name] * loss for name, loss in losses.items())}


def fooling_losses(output, text, wrong, chances, clip_maps, discriminator, clip, recipe):
    """What the discriminator says of the generated images, as in generator_loss → adversarial, matching: scalars.

    clip_maps: what CLIP sees in the highest images, before augmentation.
    """
    scales = scale_weights(output.pyramid, recipe.lower_scales)
    with torch.no_grad():
        code = discriminator.encode_text(text.tokens, text.eot)
    wrong_code, is_wrong = choose_wrong(code, wrong)
    pyramid = augment(output.pyramid, recipe.augment, chances)
    if recipe.augment:  # CLIP is asked whether the images as they are fit, the discriminator about changed ones
        clip_maps = clip.see(pyramid[max(pyramid)])[1]
    maps = discriminator.maps(pyramid, clip_maps if discriminator.map_readers else ())
    adversarial = logistic_loss(discriminator.score(maps, code), -1, EARLY_ADVERSARIAL, scales).mean()
    # The discriminator calls these images fake under a wrong caption, too, and this term answers it. A wrong caption
    # says nothing about an image, so the generator learns here to look real, whatever it shows. With the loss in the
    # discriminator alone results get worse, with both they get better (GigaGAN, table 1).
    wrong_logits = discriminator.score(maps, wrong_code)
    return adversarial, (logistic_loss(wrong_logits, -1, EARLY_MATCHING, scales) * is_wrong).mean()


def choose_wrong(code, wrong):
    """The text codes [B, D] of the captions that `wrong` numbers; and whether they are other ones, 1 or 0, [B]."""
    first = distributed.rank() * len(code)
    own = torch.arange(first, first + len(code), device=wrong.device)
    return distributed.gather(code)[wrong], (wrong != own).float()
