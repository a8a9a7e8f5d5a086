"""Every loss of Aurora, in the paper's order: adversarial, matching-aware, R1, multi-level CLIP, mixture of experts;
then those that only some recipes use.

A pyramid contains an image for each active resolution. The discriminator scores each image after every stage that it
passes. A *prediction* is named (input, stage), by their resolutions. `scales`, {resolution: weight}, weighs images.
The CLIP loss compares all images of a micro-batch, over all ranks; without gradient accumulation that is the global
batch. The others are means over a rank's images; DDP averages their gradients over ranks.
"""

import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from augment import augment
from common import distributed
from discriminator import CLIP_STAGE
from layers import float32_region, full_precision

R1_INTERVAL = 16  # R1 is computed in one step of 16, and counts 16 times there (StyleGAN2, section 3.1).
EARLY_ADVERSARIAL, EARLY_MATCHING = 0.01, 0.05  # weights of predictions before the last stage; the paper gives none
Z_LOSS_WEIGHT = 0.001  # the release's
SEEN_BY_CLIP = 64  # Of images above this resolution CLIP sees only the largest, because it resizes them to one size.


def scale_weights(resolutions, lower):
    """{resolution: weight}: each below the highest weighs `lower` times as much as that one; they sum to one."""
    weights = {r: 1 if r == max(resolutions) else lower for r in resolutions}
    total = sum(weights.values())
    return {r: weight / total for r, weight in weights.items()}


def prediction_weights(logits, early, scales):
    """{(input, stage): weight}: the weight of the image, times `early` for predictions before the last stage. CLIP
    counts as a last stage.
    """
    late = last_stage(logits), CLIP_STAGE
    return {(entry, stage): scales[entry] * (1 if stage in late else early) for entry, stage in logits}


def last_stage(logits):
    """The stage of the lowest resolution."""
    return min(stage for _, stage in logits if stage != CLIP_STAGE)


def last_prediction(logits):
    """The logits of the highest image after the last stage, [B, N]."""
    highest = max(entry for entry, _ in logits)
    return logits[highest, last_stage(logits)]


def logistic_loss(logits, sign, early, scales):
    """The non-saturating logistic loss Σ weight · softplus(sign · D) over the predictions, per image: [B].

    logits: {(input, stage): [B, N]}. sign, a number or [B, 1]: −1 if the images are to look real, +1 if fake.
    """
    weights = prediction_weights(logits, early, scales)
    total = 0
    for key, x in logits.items():
        total = total + weights[key] * F.softplus(sign * x).mean(1)
    return total


def wrong_captions(ids):
    """For each caption the index of the next different one, in a circle; its own index if all are equal.

    ids: token ids [B, T] of the captions of a micro-batch on all ranks → indices [B]. Captions a, b, a give 1, 2, 1.
    """
    batch, position = len(ids), torch.arange(len(ids), device=ids.device)
    differs = torch.cdist(ids.float(), ids.float(), p=0) > 0  # [B, B]; p=0 counts the tokens that differ
    distance = (position - position[:, None]) % batch  # [B, B]: how far caption j comes after caption i
    distance = torch.where(differs, distance, distance + batch)  # equal ones come last, itself first
    # Captions a, b, a: [[3, 1, 5], [2, 3, 1], [4, 2, 3]].
    return distance.argmin(1)


def feature_maps(discriminator, clip, pyramid, clip_maps=None):
    """Discriminator.maps of a pyramid. The base's discriminator also reads CLIP's maps of the highest image: it is
    vision-aided (GigaGAN, section 3.4). The upsampler's is not (section 3.5 there). clip_maps: these maps, if known.
    """
    if not discriminator.map_readers:
        clip_maps = ()
    elif clip_maps is None:
        _, clip_maps = clip.see(pyramid[max(pyramid)])
    return discriminator.maps(pyramid, clip_maps)


def r1_penalty(discriminator, clip, pyramid, tokens, eot, gamma, scales):
    """R1 (Mescheder et al. 2018) on real images, as the discriminator sees them, and their captions, in float32: a
    scalar.

    Each image of the pyramid adds scale · γ_r/2 · ‖gradient by its pixels‖², with γ_r = gamma · (r/64)². This is
    the gradient of the sum of the predictions of its group; those before the last stage have weight EARLY_ADVERSARIAL.
    No image affects the predictions for another resolution or another group, so one backward pass gives all gradients.
    """
    with float32_region(tokens), sdpa_kernel(SDPBackend.MATH):  # fused attention, as in CLIP, has no second derivative
        pyramid = {r: full_precision(x.detach()).requires_grad_() for r, x in pyramid.items()}
        code = discriminator.encode_text(full_precision(tokens), eot)
        logits = discriminator.score(feature_maps(discriminator, clip, pyramid), code)
        # All scales are 1 here, as they are applied below to the squared gradients.
        weights = prediction_weights(logits, EARLY_ADVERSARIAL, dict.fromkeys(pyramid, 1))
        score = sum(weights[key] * x.mean(1).sum() for key, x in logits.items())
        gradients = torch.autograd.grad(score, list(pyramid.values()), create_graph=True)
        total = 0
        for r, gradient in zip(pyramid, gradients, strict=True):
            squared_norm = gradient.square().sum((1, 2, 3)).mean()
            total = total + scales[r] * gamma * (r / 64) ** 2 / 2 * squared_norm
        return total


def clip_loss(clip, embeddings, text_embedding, scales, lower_every=1):
    """Symmetric InfoNCE between captions and images over all ranks, a weighted sum over the resolutions.

    embeddings: {resolution: CLIP's embeddings [B, D]}, not normalized; below the highest resolution, of every n-th
    image, n = lower_every. text_embedding [B, D], of unit length. Gradients pass through the gather. Otherwise DDP's
    averaging would divide this term by the number of ranks. Equal captions count as wrong for each other's images here.
    Their embeddings are equal, so no image is favoured; but of k equal captions the smallest loss is log k, and other
    captions weigh less.
    """
    info_nce = open_clip.ClipLoss(
        gather_with_grad=True, rank=distributed.rank(), world_size=distributed.world_size(), cache_labels=False
    )
    with float32_region(text_embedding):  # cosines are multiplied by up to 100
        total = 0
        for r, embedding in embeddings.items():
            embedding = F.normalize(full_precision(embedding), dim=-1)
            every = 1 if r == max(embeddings) else lower_every
            captions = text_embedding[::every]
            total = total + scales[r] * info_nce(embedding, captions, clip.logit_scale)
        return total


def z_loss(logits):
    """The mean over points of logsumexp(logits)², logits [B, N, E], which keeps them small (ST-MoE, equation 5)."""
    return logits.logsumexp(-1).square().mean()


def load_balancing_loss(logits, expert_index):
    """E·Σₑ fₑ·Pₑ for each image, then the mean over the batch (Switch Transformer, equations 4 to 6); 1 if balanced.

    fₑ is the share of the image's points that go to expert e, Pₑ the mean of its probability over all points.
    """
    assert expert_index.shape == logits.shape[:-1], "one expert a point; for top-k take the sum over the choices"
    num_experts = logits.shape[-1]
    share = F.one_hot(expert_index, num_experts).to(logits.dtype).mean(1)
    probability = logits.softmax(-1).mean(1)
    balance = num_experts * (share * probability).sum(-1)
    return balance.mean()


def moe_loss(output, balance_weight):
    """The weighted sum of z_loss and load_balancing_loss over all routers of an aurora.Output: a scalar."""
    total = output.w.new_zeros(())  # if there is no router, for example at 4×4
    for routing in output.routings.values():
        total = total + Z_LOSS_WEIGHT * z_loss(routing.logits)
        total = total + balance_weight * load_balancing_loss(routing.logits, routing.expert_index)
    return total


def perceptual_distance(maps, others):
    """LPIPS (Zhang et al. 2018) without its learned weights: the squared distance between feature maps of two images,
    whose channels have unit length at each point. maps, others: lists of [B, C, h, w]; → [B], from 0 to 4.
    """
    distances = []
    for a, b in zip(maps, others, strict=True):
        a, b = F.normalize(full_precision(a), dim=1), F.normalize(full_precision(b), dim=1)
        distance = (a - b).square().sum(1)  # [B, h, w]
        distances.append(distance.mean((1, 2)))
    return torch.stack(distances).mean(0)


def pixel_distance(pyramid, real, scales):
    """L1 between two pyramids, a weighted sum over the resolutions: a scalar."""
    total = 0
    for r, image in pyramid.items():
        total = total + scales[r] * F.l1_loss(full_precision(image), real[r])
    return total


# ----------------------------------------------------------------------------------------------------------------------
# The two objectives. DDP only wraps a module's forward, but the discriminator's objective calls several methods of the
# network (encode_text, maps, score). So this objective is a module, and DDP wraps it. That of the generator receives
# finished images.


class DiscriminatorLoss(nn.Module):
    """The discriminator's objective: adversarial + matching. step.py adds R1."""

    def __init__(self, discriminator, clip, recipe):
        super().__init__()
        self.discriminator, self.clip = discriminator, clip
        self.recipe = recipe

    def forward(self, real, fake, text, wrong, chances):
        """→ {name: scalar}; `loss` is to be minimized.

        real, fake: pyramids. text: clip.Text of this rank's captions. wrong [B]: from wrong_captions, for these.
        chances [B, 2, NUM_CHANCES]: for the augmentation of the real images, and of the fake ones.
        """
        d, batch, scales = self.discriminator, len(wrong), scale_weights(real, self.recipe.lower_scales)
        assert batch % d.group == 0, "a group would contain real and generated images"
        code = d.encode_text(text.tokens, text.eot)
        wrong_code, is_wrong = wrong_codes(code, wrong)
        real = augment(real, self.recipe.augment, chances[:, 0])
        fake = augment(fake, self.recipe.augment, chances[:, 1])

        maps = feature_maps(d, self.clip, {r: torch.cat([real[r], fake[r]]) for r in real})
        right_logits = d.score(maps, code.repeat(2, 1))
        wrong_logits = d.score(maps, wrong_code.repeat(2, 1))
        one = code.new_ones(batch, 1)
        sign = torch.cat([-one, one])  # real images are to look real, fake ones fake

        # Dividing by half of the images gives the mean over real ones plus the mean over fake ones.
        adversarial = logistic_loss(right_logits, sign, EARLY_ADVERSARIAL, scales).sum() / batch
        matching = logistic_loss(wrong_logits, 1, EARLY_MATCHING, scales) * is_wrong.repeat(2)
        matching = matching.sum() / batch
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


def generator_loss(output, text, wrong, chances, discriminator, clip, recipe, real=None, perceptual=None):
    """The generator's objective: adversarial + matching + multi-level CLIP + mixture of experts; for the upsampler also
    the L1 and perceptual distances to the true image. → {name: scalar}; `loss` is to be minimized.

    output: aurora.Output for the captions `text`.
    wrong [B]: from wrong_captions, for these captions. chances [B, NUM_CHANCES]: for the augmentation.
    discriminator, clip: both frozen.
    real: the pyramid of the true images. perceptual: a frozen network, images [B, 3, R, R] → feature maps. The
    upsampler's recipes need both.
    """
    losses, weights = {"g_moe": moe_loss(output, recipe.balance_weight)}, {"g_moe": 1}
    clip_maps = None
    if recipe.clip_weight:
        losses["g_clip"], clip_maps = pyramid_clip_loss(output.pyramid, text, clip, recipe)
        weights["g_clip"] = recipe.clip_weight
    if recipe.adversarial_weight:
        fooling = fooling_losses(output, text, wrong, chances, clip_maps, discriminator, clip, recipe)
        losses["g_adversarial"], losses["g_matching"] = fooling
        weights["g_adversarial"] = recipe.adversarial_weight
        weights["g_matching"] = recipe.adversarial_weight * recipe.matching_weight_generator
    if recipe.l1_weight:
        scales = scale_weights(output.pyramid, recipe.lower_scales)
        losses["g_l1"] = pixel_distance(output.pyramid, real, scales)
        weights["g_l1"] = recipe.l1_weight
    if recipe.perceptual_weight:
        with torch.no_grad():
            wanted = perceptual(real[max(real)])
        losses["g_perceptual"] = perceptual_distance(perceptual(output.image), wanted).mean()
        weights["g_perceptual"] = recipe.perceptual_weight
    return losses | {"loss": sum(weights[name] * loss for name, loss in losses.items())}


def pyramid_clip_loss(pyramid, text, clip, recipe):
    """clip_loss of the generated images that CLIP sees → the loss, and CLIP's maps of the highest images.

    CLIP sees the highest images, and of lower ones up to SEEN_BY_CLIP the share that the recipe asks for.
    """
    highest = max(pyramid)
    lower = [r for r in pyramid if r < highest and r <= SEEN_BY_CLIP]
    seen = {r: pyramid[r][:: recipe.clip_lower_every] for r in lower}
    seen[highest] = pyramid[highest]  # comes last
    embeddings, maps = clip.see(*seen.values())  # one pass for all
    embeddings = dict(zip(seen, embeddings.split([len(images) for images in seen.values()]), strict=True))
    scales = scale_weights(seen, recipe.lower_scales)
    loss = clip_loss(clip, embeddings, text.embedding, scales, recipe.clip_lower_every)
    return loss, [x[-len(pyramid[highest]) :] for x in maps]


def fooling_losses(output, text, wrong, chances, clip_maps, discriminator, clip, recipe):
    """The terms of generator_loss that the discriminator computes → adversarial, matching: scalars.

    clip_maps: CLIP's feature maps of the highest images, without augmentation.
    """
    scales = scale_weights(output.pyramid, recipe.lower_scales)
    with torch.no_grad():
        code = discriminator.encode_text(text.tokens, text.eot)
    wrong_code, is_wrong = wrong_codes(code, wrong)
    pyramid = augment(output.pyramid, recipe.augment, chances)
    # clip_maps are of the images themselves; the discriminator needs those of the augmented ones.
    maps = feature_maps(discriminator, clip, pyramid, None if recipe.augment else clip_maps)
    right_logits = discriminator.score(maps, code)
    adversarial = logistic_loss(right_logits, -1, EARLY_ADVERSARIAL, scales).mean()
    # The generator is to be accepted under a wrong caption, too; it can achieve this only by looking real. Results get
    # worse with the matching loss in the discriminator alone, and better with it in both (GigaGAN, table 1).
    wrong_logits = discriminator.score(maps, wrong_code)
    matching = logistic_loss(wrong_logits, -1, EARLY_MATCHING, scales) * is_wrong
    return adversarial, matching.mean()


def wrong_codes(code, wrong):
    """code [B, D]: text codes of this rank's captions; wrong [B]: indices into all ranks' captions → the codes at these
    indices [B, D], and 1 where the caption is another one, else 0, [B].
    """
    first = distributed.rank() * len(code)
    own = torch.arange(first, first + len(code), device=wrong.device)
    return distributed.gather(code)[wrong], (wrong != own).float()
