"""Whether the discriminator learns training images by heart, where these are few.

It is asked about real images that it learns from, about held-out ones, and about generated ones. Once it takes held-out
images for generated ones, it knows the others by heart, and has nothing left to teach (StyleGAN2-ADA, section 3).
"""

import torch

from clip import Text
from common import distributed
from common.distributed import say
from layers import pyramid
from upsampler import given_images, input_noise

COUNT = 128  # images of each kind, shared by the ranks
BATCH = 16  # images at a time
LIMIT = 0.5  # warn once `overfitting` is above this


class OverfittingWatch:
    """Holds the images to ask about. source: see data.sources; without held-out pairs there is nothing to measure."""

    def __init__(self, source, clip):
        self.told = False
        self.seen = first_pairs(source.evaluation(COUNT), clip)
        self.held_out = first_pairs(source.evaluation(COUNT, held_out=True), clip)

    @torch.no_grad()
    def measure(self, learner, seed):
        """→ {"logits_seen", "logits_held_out", "logits_generated", "overfitting"}, or nothing without held-out pairs.

        overfitting: r_v = (D(seen) − D(held out)) / (D(seen) − D(generated)), by the last prediction for the highest
        image: 0 if it cannot tell held-out images from those it learns from, 1 if it takes them for generated ones.
        """
        if self.seen is None or self.held_out is None:
            return {}
        config, noise = learner.generator.config, torch.Generator().manual_seed(seed)
        count = len(self.held_out[0])
        z, small = torch.randn(count, config.z_dim, generator=noise), input_noise(config, count, noise)

        def real(images, text, _):
            return pyramid(images, learner.active)

        def generated(images, text, some):
            given = given_images(config, images, small[some])
            with learner.autocast():
                return learner.ema(*given, z[some].to(images.device), *text[:2], learner.active[-1]).pyramid

        kinds = ((self.seen, real), (self.held_out, real), (self.held_out, generated))
        seen, held_out, fake = (mean_score(learner, *kind) for kind in kinds)
        ratio = (seen - held_out) / (seen - fake).clamp(min=1e-6)
        values = {"logits_seen": seen, "logits_held_out": held_out, "logits_generated": fake, "overfitting": ratio}
        if ratio > LIMIT and not self.told:
            say(
                "warning: the discriminator knows its training images by heart: on a scale from those to generated "
                f"ones, held-out images stand at {100 * ratio:.0f} %. More images help, or the recipe's `augment`"
            )
            self.told = True
        return {name: value.item() for name, value in values.items()}


def mean_score(learner, pairs, look):
    """The discriminator's mean logit for `look`(images, text, which) of pairs; every rank takes a share of them."""
    images, text = pairs
    mine = torch.arange(distributed.rank(), len(images), distributed.world_size())
    total = images.new_zeros(2)
    for some in mine.split(BATCH) if len(mine) else ():
        which = some.to(images.device)
        captions = Text(*(x[which] for x in text))
        scores = learner.score(look(images[which], captions, some), captions)
        total += torch.stack([scores.sum(), scores.new_full((), len(some))])
    score, count = distributed.mean(total)
    return score / count


def first_pairs(batches, clip):
    """The first batch of a source's pairs → images [B, 3, R, R] and clip.Text, on the CLIP's device; None of none."""
    if (batch := next(batches, None)) is None:
        return None
    return batch.images.to(clip.device), clip.read(batch.captions)
