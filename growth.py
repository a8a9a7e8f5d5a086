"""Progressive training (section 3.3): training grows to the next resolution when the FID at this one comes near a
reference, stops falling, or enough images were seen.

The reference is the FID between two disjoint sets of real images, each as large as the set of samples.
"""

import contextlib
from dataclasses import dataclass

import torch

from common import distributed, stopping
from common.cli import UserError
from common.disk import Damaged, atomically, load_tensors, write_tensors
from evaluation.features import extract_clip_features, extract_fake_features
from evaluation.metrics import fid, frechet_distance, statistics
from layers import resize
from upsampler import draw_input_noise, given_images

PATIENCE = 10  # evaluations without a better FID after which a phase ends


@dataclass
class Phase:
    """The state of the growth; part of a run's checkpoint."""

    number: int = 0  # index of the highest active resolution
    images: int = 0  # real ones seen at this resolution
    best_fid: float = float("inf")  # at this resolution
    evaluations_since_best: int = 0


class Growth:
    """Measures the generator at its active resolution, and decides when to grow."""

    def __init__(self, recipe, resolutions, clip, seed, config=None):
        """config: the generator's; an upsampler also needs input images."""
        if missing := [r for r in resolutions[:-1] if r not in recipe.images_per_phase]:
            raise UserError(f"the preset's images_per_phase does not say when to grow from {missing[0]}×{missing[0]}")
        self.recipe, self.resolutions, self.clip, self.seed, self.config = recipe, resolutions, clip, seed, config
        self.phase = Phase()

    @property
    def active(self):
        """The resolutions that learn, from low to high."""
        return self.resolutions[: self.phase.number + 1]

    def measure_reference(self, source, path):
        """Draws two disjoint sets of real images. Samples use the captions of the first, and are compared with the
        statistics of the second.

        Each rank measures its share, held-out pairs first. A run writes the result to the file `path`, and reads it
        when it is resumed. Raises UserError, and Stopped if a rank was asked to stop.
        """
        kept = None
        with distributed.together(), contextlib.suppress(Damaged):  # then it is measured again
            if distributed.is_main() and path.is_file():
                kept = load_tensors(path)
        kept = distributed.broadcast(kept)
        if kept and kept.get("samples") != self.recipe.fid_samples:  # with others, the best FID means nothing
            kept, self.phase.best_fid, self.phase.evaluations_since_best = None, float("inf"), 0
        if not kept:
            kept = self.compute_reference(source)
            if distributed.is_main():
                atomically(path, lambda temporary: write_tensors(kept, temporary))
        self.captions, self.given = kept["captions"], kept["given"]
        self.statistics, self.reference_fid = kept["statistics"], kept["reference_fid"]

    def compute_reference(self, source):
        """→ {"samples": of the recipe, "captions", "given": an upsampler's inputs, "statistics": {resolution: (mean,
        covariance)}, "reference_fid": {resolution: FID}}.
        """
        with distributed.together(), contextlib.suppress(stopping.Stopped):  # then a rank was asked, see below
            features, captions, given = self.measure_share(source)
        if distributed.anywhere(stopping.asked()):
            raise stopping.Stopped
        captions = [caption for share in distributed.collect(captions) for caption in share]
        given = [batch for share in distributed.collect(given) for batch in share]
        with distributed.together():
            if len(captions) < 4:
                raise UserError(f"--data has {len(captions)} usable pairs; training needs at least 4")
        half = len(captions) // 2
        kept = {"samples": self.recipe.fid_samples, "captions": captions[:half], "statistics": {}, "reference_fid": {}}
        kept["given"] = tuple(torch.cat(inputs)[:half].clone() for inputs in zip(*given, strict=True))
        for r in self.resolutions:
            every = torch.cat([part for share in distributed.collect(features[r]) for part in share])
            one, other = every[: 2 * half].split(half)
            kept["statistics"][r], kept["reference_fid"][r] = statistics(other), fid(one, other)
        kept["reference_fid"] = distributed.broadcast(kept["reference_fid"])  # bit-identical, as it decides the growth
        return kept

    @torch.no_grad()
    def measure_share(self, source):
        """This rank's share of the pairs → {resolution: a list of features}, captions, and for each batch the inputs of
        an upsampler: small images and noise; nothing for the base.
        """
        rank, ranks = distributed.rank(), distributed.world_size()
        features, captions, given = {r: [] for r in self.resolutions}, [], []
        noise = torch.Generator().manual_seed(self.seed + rank)
        for batch in source.held_out_first(rank=rank, world_size=ranks, count=2 * self.recipe.fid_samples):
            images = batch.images.to(self.clip.device)
            captions += batch.captions
            its_noise = draw_input_noise(self.config, len(images), noise)
            given.append([x.cpu() for x in given_images(self.config, images, its_noise)])
            for r in self.resolutions:
                features[r].append(extract_clip_features(self.clip, resize(images, r)).cpu())
            if stopping.asked():
                break
        return features, captions, given

    def evaluate(self, generator):
        """Measures the FID at the active resolution, and records it in the phase → the FID and its reference."""
        phase, resolution = self.phase, self.active[-1]
        features = extract_fake_features(generator, self.clip, self.captions, resolution, self.seed, self.given)
        value = frechet_distance(statistics(features.cpu()), self.statistics[resolution])
        value = distributed.broadcast(value)  # bit-identical on all ranks
        phase.evaluations_since_best = 0 if value < phase.best_fid else phase.evaluations_since_best + 1
        phase.best_fid = min(phase.best_fid, value)
        return {"fid": value, "reference_fid": self.reference_fid[resolution]}

    def reason_to_grow(self):
        """Why training should grow now, in words, or None."""
        phase, resolution = self.phase, self.active[-1]
        if resolution == self.resolutions[-1]:
            return None
        if phase.best_fid <= self.recipe.fid_factor * self.reference_fid[resolution]:
            return "it is near the reference"
        if phase.evaluations_since_best >= PATIENCE:
            return "it stopped falling"
        if phase.images >= self.recipe.images_per_phase[resolution]:
            return "it has seen its share of images"
        return None

    def describe(self):
        """The best FID of the active resolution and its reference, in words."""
        phase = self.phase
        measured = "not measured" if phase.best_fid == float("inf") else f"{phase.best_fid:.3g}"
        return f"FID {measured}, reference {self.reference_fid[self.active[-1]]:.3g}"

    def grow(self):
        """Makes the next resolution active. Learner.learn_at lets its parameters learn, from a ToRGB of zero."""
        self.phase = Phase(self.phase.number + 1)
