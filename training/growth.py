"""Progressive training (section 3.3): a resolution is learned when the FID of its samples comes near a reference.

The reference is the FID between two disjoint sets of real images, as many on each side as samples are compared with.
"""

from dataclasses import dataclass, field

from common import distributed
from common.cli import UserError
from evaluation.metrics import extract_fake_features, extract_real_features, fid

PATIENCE = 10  # evaluations without a better FID after which a stage ends


@dataclass
class Stage:
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
        self.stage = Stage()

    @property
    def active(self):
        """The resolutions that learn, from low to high."""
        return self.resolutions[: self.stage.number + 1]

    def measure_reference(self, source):
        """Two disjoint sets of real images: one lends its captions and one its features. Raises UserError."""
        with distributed.together():
            count = 2 * self.recipe.fid_samples
            features, self.captions = extract_real_features(self.clip, source.evaluation(), count, self.resolutions)
            if len(self.captions) < 4:
                raise UserError(f"--data holds {len(self.captions)} usable pairs; training needs at least 4")
        half = len(self.captions) // 2
        self.fid_captions = self.captions[:half]
        self.fid_features = {r: f[half : 2 * half] for r, f in features.items()}
        reference = {r: fid(f[:half], f[half : 2 * half]) for r, f in features.items()}
        self.stage.reference_fid = distributed.broadcast(reference)

    def evaluate(self, generator):
        """A generator's FID at the active resolution, beside its reference."""
        stage, resolution = self.stage, self.active[-1]
        features = extract_fake_features(generator, self.clip, self.fid_captions, resolution, self.seed)
        value = distributed.broadcast(fid(features, self.fid_features[resolution]))  # the same, to the last bit
        stage.evaluations_since_best = 0 if value < stage.best_fid else stage.evaluations_since_best + 1
        stage.best_fid = min(stage.best_fid, value)
        return {"fid": value, "reference_fid": stage.reference_fid[resolution]}

    def reason_to_grow(self):
        """Why this resolution is done with, in words, or None."""
        stage, resolution = self.stage, self.active[-1]
        if resolution == self.resolutions[-1]:
            return None
        reasons = {
            "it is near the reference": stage.best_fid <= self.recipe.fid_factor * stage.reference_fid[resolution],
            "it stopped falling": stage.evaluations_since_best >= PATIENCE,
            "that took its images": stage.images >= self.recipe.images_per_stage[resolution],
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def grow(self):
        self.stage = Stage(self.stage.number + 1, reference_fid=self.stage.reference_fid)
