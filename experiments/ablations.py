"""Removes one part of Aurora at a time, and measures the loss of quality after equal training time on one core.

    python -m experiments.ablations                                     # the base: every variant, three seeds each
    python -m experiments.ablations --preset emoji-256 --minutes 10     # the second stage
    python -m experiments.ablations --only full "one expert" --seeds 1  # a quick look

The model has no switches for this: a variant is another preset, or replaces a class of Aurora while it is trained and
measured. Finished runs are not repeated, so two commands can share the variants between two cores.
"""

import contextlib
import dataclasses
import itertools
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

import aurora
from clip import load_clip
from common.cli import Parser, UserError, a_path, errors_in_one_line, positive_int
from common.disk import write_text
from data import sources
from evaluation import enlarging
from evaluation.features import drawing, measure
from experiments.compare import markdown, real_emoji, shown
from modulation import ModulatedConv2d
from presets import PRESETS, UpsamplerConfig
from router import Router
from step import Learner
from text import TextHead
from weights.efficientnet import load_efficientnet

CPU = torch.device("cpu")
MINUTE = 60  # seconds of processor time
COUNT, COUNT_LARGE = 1000, 96  # measured pictures of the base and of the second stage


class RouterWithoutW(Router):
    """Sees the feature point alone: the scales of its channels are learned and do not depend on w."""

    def forward(self, u, w):
        return super().forward(u, torch.zeros_like(w))


class UndeformedConv2d(ModulatedConv2d):
    """Replaces a DeformableConv2d."""

    def __init__(self, in_channels, out_channels, w_dim, num_kernels=1):
        super().__init__(in_channels, out_channels, 3, w_dim, num_kernels)


class UnreadText(TextHead):
    """The same output for every caption. Discriminator and CLIP still read the caption."""

    def forward(self, tokens, eot):
        return super().forward(torch.zeros_like(tokens), torch.zeros_like(eot))


@dataclass
class Variant:
    """The differences from the full model."""

    recipe: dict = field(default_factory=dict)  # fields of the recipe
    generator: dict = field(default_factory=dict)  # fields of the generator's config
    levels: dict = field(default_factory=dict)  # fields of every level of the generator that has them
    replaced: tuple = ()  # module, name, substitute

    def preset(self, full):
        changed = []
        for level in full.generator.levels:
            fields = {name: value for name, value in self.levels.items() if getattr(level, name)}
            changed.append(dataclasses.replace(level, **fields))
        generator = dataclasses.replace(full.generator, levels=tuple(changed), **self.generator)
        return dataclasses.replace(full, generator=generator, recipe=dataclasses.replace(full.recipe, **self.recipe))

    def in_place(self):
        """A context in which the substitute replaces Aurora's own."""
        return mock.patch.object(*self.replaced) if self.replaced else contextlib.nullcontext()


BASE = {
    "full": Variant(),
    "router without w": Variant(replaced=(aurora, "Router", RouterWithoutW)),
    "one expert": Variant(levels={"num_experts": 1}),
    "no matching loss": Variant(recipe={"matching_weight_discriminator": 0.0, "matching_weight_generator": 0.0}),
    "no CLIP loss": Variant(recipe={"clip_weight": 0.0}),
    "no MTM": Variant(replaced=(aurora, "DeformableConv2d", UndeformedConv2d)),
    "no adaptive kernels": Variant(levels={"num_kernels": 1}),
    "not progressive": Variant(recipe={"images_per_phase": {4: 0, 8: 0}}),
}
SECOND_STAGE = {
    "full": Variant(),
    "L1 only": Variant(recipe={"adversarial_weight": 0.0, "clip_weight": 0.0, "perceptual_weight": 0.0}),
    "no text": Variant(replaced=(aurora, "TextHead", UnreadText)),
    "no noise on the input": Variant(generator={"input_noise": 0.0}),
    "inputs without distortion": Variant(generator={"input_bend": 0.0, "input_stain": 0.0}),
    "one expert": Variant(levels={"num_experts": 1}),
}
VARIANTS = {"emoji": BASE, "emoji-256": SECOND_STAGE}


def full_preset(name):
    """The preset that variants change. `emoji` ends at 16×16 here, with adaptive kernels at 16×16."""
    preset = PRESETS[name]
    if name != "emoji":
        return preset
    *lower, highest = preset.generator.levels[:3]
    levels = (*lower, dataclasses.replace(highest, num_kernels=2))
    return dataclasses.replace(
        preset,
        generator=dataclasses.replace(preset.generator, levels=levels),
        discriminator=dataclasses.replace(preset.discriminator, levels=preset.discriminator.levels[:3]),
        recipe=dataclasses.replace(preset.recipe, images_per_phase={4: 0, 8: 4000}),
    )


def learn(preset, seed, minutes):
    """Trains on the emoji for some minutes of processor time → the Learner, and the number of images.

    It grows after a number of images, not by FID, so that all variants have the same schedule.
    """
    clip, recipe = load_clip(preset.clip_model), preset.recipe
    clip.text.cache.clear()  # each run pays for reading its captions
    torch.manual_seed(seed)
    perceptual = load_efficientnet(features_only=True) if recipe.perceptual_weight else None
    learner = Learner(preset, clip, CPU, torch.float32, recipe.batch, perceptual)
    resolutions = learner.resolutions
    starts = [0, *itertools.accumulate(recipe.images_per_phase[r] for r in resolutions[:-1])]
    source = sources.open_data("emoji", resolutions[-1], seed, group=preset.discriminator.group)
    batches = sources.loader(source, 0, recipe.batch, workers=0)
    ends, number = time.process_time() + MINUTE * minutes, 0
    while time.process_time() < ends:
        active = [r for r, start in zip(resolutions, starts, strict=True) if start <= number * recipe.batch]
        if learner.active != active:
            learner.learn_at(active)
        learner.step(number, learner.prepare(seed, number, [next(batches)]))
        number += 1
    return learner, number * recipe.batch


def measure_base(generator, text_encoder):
    resolution = generator.config.resolutions[-1]
    extractors, captions, real = real_emoji(COUNT, resolution)
    found = measure(drawing(generator, text_encoder, resolution), captions, real, COUNT, 0, resolution, extractors)
    return {name: found[name] for name in ("R-precision", "precision", "recall", "FID")}


def measure_second_stage(upsampler, text_encoder):
    """On held-out emoji, averaged down and enlarged again."""
    small, large = upsampler.config.input_resolution, upsampler.config.resolutions[-1]
    source, enlargers = sources.open_data("emoji", large, 0), {"ours": enlarging.enlarger(upsampler, text_encoder)}
    found = enlarging.compare(enlargers, source, small, large, COUNT_LARGE)["ours"]
    return {"perceptual distance": found["perceptual"], "FD": found["fd"]}


def run(variant, full, seed, minutes):
    """Trains a variant → {measure: number}, with the number of images."""
    measure_stage = measure_second_stage if isinstance(full.generator, UpsamplerConfig) else measure_base
    with variant.in_place():
        learner, images = learn(variant.preset(full), seed, minutes)
        return measure_stage(learner.ema, learner.clip) | {"images": images}


def run_all(preset, names, seeds, minutes, out):
    """→ {variant: [a result for each seed]}. Reads the results that `out` contains, and runs the others."""
    results = {name: [] for name in names}
    jobs = [(name, seed) for seed in range(seeds) for name in names]
    for name, seed in tqdm(jobs, unit="run"):
        path = out / preset / f"{minutes}-minutes" / name.replace(" ", "-") / f"{seed}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(run(VARIANTS[preset][name], full_preset(preset), seed, minutes)))
        results[name].append(json.loads(path.read_text("utf-8")))
    return results


def table(results):
    """{variant: [{measure: number} of each seed]} → markdown: mean ± standard deviation over the seeds."""
    measures = list(next(iter(results.values()))[0])
    rows = [["", *measures]]
    for variant, runs in results.items():
        cells = []
        for name in measures:
            values = [result[name] for result in runs]
            spread = f" ± {shown(statistics.stdev(values))}" if len(values) > 1 else ""
            cells.append(shown(statistics.mean(values)) + spread)
        rows.append([variant, *cells])
    return markdown(rows)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=VARIANTS, default="emoji", help="the base up to 16×16, or the second stage")
    parser.add_argument("--only", nargs="+", action="extend", help="variants to run (default: all)")
    parser.add_argument("--seeds", type=positive_int, default=3, help="runs of each variant")
    parser.add_argument("--minutes", type=positive_int, default=20, help="of one core, to train each run")
    parser.add_argument("--out", type=a_path, default=Path("runs/ablations"), help="folder of the results")
    args = parser.parse_args()
    with errors_in_one_line():
        known = VARIANTS[args.preset]
        names = args.only or list(known)
        if unknown := set(names) - known.keys():
            raise UserError(f"no variant {min(unknown)!r}; choose from: {', '.join(known)}")
        torch.set_num_threads(1)
        print(table(run_all(args.preset, names, args.seeds, args.minutes, args.out)))


if __name__ == "__main__":
    main()
