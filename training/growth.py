"""Progressive training (section 3.3): a resolution is learned when the FID of its samples comes near a reference.

The reference is the FID between two disjoint sets of real images, as many on each side as samples are compared with.
"""

from dataclasses import dataclass, field

from common import distributed
from common.cli import UserError
from evaluation.metrics import fake_features, fid, real_features

PATIENCE = 10  # evaluations without a better FID after which a stage ends


@dataclass
class Phase:
    """Where the growth stands; part of a run's checkpoint."""

    number: int = 0  # index of the active resolution
    images: int = 0  # real ones seen at this resolution
    best_fid: float = float("inf")  # at this resolution
    evaluations_since_best: int = 0
    reference_fid: dict[int, float] = field(default_factory=dict)


class Growth:
    """Measures the generator at its active resolution, and decides when to go on to the next."""

    def __init__(self, recipe, resolutions, clip, seed):
        self.recipe, self.resolutions, self.clip, self.seed = recipe, resolutions, clip, seed
        self.phase = Phase()

    @property
    def active(self):
        """The resolutions that learn, from low to high."""
        return self.resolutions[: self.phase.number + 1]

    def measure_reference(self, source):
        """Two disjoint sets of real images: one lends its captions and one its features. Raises UserError."""
        with distributed.together():
            count = 2 * self.recipe.fid_samples
            features, self.captions = real_features(self.clip, source.evaluation(), count, self.resolutions)
            if len(self.captions) < 4:
                raise UserError(f"--data holds {len(self.captions)} usable pairs; training needs at least 4")
        half = len(self.captions) // 2
        self.fid_captions = self.captions[:half]
        self.fid_features = {r: f[half : 2 * half] for r, f in features.items()}
        reference = {r: fid(f[:half], f[half : 2 * half]) for r, f in features.items()}
        self.phase.reference_fid = distributed.broadcast(reference)

    def evaluate(self, generator):
        """A generator's FID at the active resolution, beside its reference."""
        phase, resolution = self.phase, self.active[-1]
        features = fake_features(generator, self.clip, self.fid_captions, resolution, self.seed)
        value = distributed.broadcast(fid(features, self.fid_features[resolution]))  # the same, to the last bit
        phase.evaluations_since_best = 0 if value < phase.best_fid else phase.evaluations_since_best + 1
        phase.best_fid = min(phase.best_fid, value)
        return {"fid": value, "reference_fid": phase.reference_fid[resolution]}

    def reason_to_grow(self):
        """Why this resolution is done with, in words, or None."""
        phase, resolution = self.phase, self.active[-1]
        if resolution == self.resolutions[-1]:
            return None
        reasons = {
            "it is near the reference": phase.best_fid <= self.recipe.fid_factor * phase.reference_fid[resolution],
            "it stopped falling": phase.evaluations_since_best >= PATIENCE,
            "that took its images": phase.images >= self.recipe.images_per_stage[resolution],
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def describe(self):
        """The best FID of the active resolution beside its reference, in words."""
        phase = self.phase
        return f"FID {phase.best_fid:.3g}, reference {phase.reference_fid[self.active[-1]]:.3g}"

    def grow(self):
        self.phase = Phase(self.phase.number + 1, reference_fid=self.phase.reference_fid)
