"""Takes one part of Aurora out at a time, and measures at equal numbers of images what that costs.

    python -m experiments.ablations                                    # everything, three seeds each
    python -m experiments.ablations --only full "one expert" --seeds 1   # a look

The model has no switches for this: a variant is another preset, or another class put in the place of Aurora's. Each run
has a process and one thread of its own, and what is done is not done again.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from tqdm import tqdm

import aurora
import discriminator
import train
from baselines.ladagan import AdditiveAttention
from common.cli import HelpFormatter, UserError, a_path, positive_int, told_in_one_line
from common.disk import atomically
from data import sources
from evaluation.extractors import load_extractor
from evaluation.features import embed, extract_generated, extract_real
from evaluation.metrics import compare_images, compare_texts
from layers import Linear
from modulation import ModulatedConv2d, ModulatedLinear
from presets import PRESETS
from router import Router
from training.loop import stopping_when_asked

BATCH = 32
COUNT = 1000  # pictures that are measured, beside twice as many real ones
MEASURES = ("R-precision", "precision", "recall", "FID")  # columns of the table; all but the distance in %

# ----------------------------------------------------------------------------------------------------------------------
# The variants: each takes the base preset, puts its substitutes into this process's modules, → the preset to train.


def base(images):
    """`emoji` up to 16×16, with adaptive kernels there, and a quarter of the images at 8×8."""
    preset = PRESETS["emoji"]
    *lower, highest = preset.generator.levels[:3]
    levels = (*lower, dataclasses.replace(highest, num_kernels=2))
    # The phases end by their images: the FID that may end one earlier would make the variants' schedules differ.
    phases = {"images_per_phase": {4: 0, 8: images // 4}, "fid_every": 2 * images, "fid_samples": 64}
    return dataclasses.replace(
        preset,
        generator=dataclasses.replace(preset.generator, levels=levels),
        discriminator=dataclasses.replace(preset.discriminator, levels=preset.discriminator.levels[:3]),
        recipe=dataclasses.replace(preset.recipe, **phases),
    )


def recipe(**changes):
    return lambda preset: dataclasses.replace(preset, recipe=dataclasses.replace(preset.recipe, **changes))


def levels(**changes):
    """Changes every level of the generator that has what is changed."""

    def variant(preset):
        changed = tuple(
            dataclasses.replace(level, **{k: v for k, v in changes.items() if getattr(level, k)})
            for level in preset.generator.levels
        )
        return dataclasses.replace(preset, generator=dataclasses.replace(preset.generator, levels=changed))

    return variant


def replacing(*replacements):
    """(module, name, substitute): what of a module is another thing in this process from now on."""

    def variant(preset):
        for module, name, substitute in replacements:
            setattr(module, name, substitute)
        return preset

    return variant


class RouterWithoutW(Router):
    """Sees the feature point alone: the scales of its channels are learned, and the same under every w."""

    def forward(self, u, w):
        return super().forward(u, torch.zeros_like(w))


class UndeformedConv2d(ModulatedConv2d):
    """Stands where a DeformableConv2d did."""

    def __init__(self, in_channels, out_channels, w_dim, num_kernels=1):
        super().__init__(in_channels, out_channels, 3, w_dim, num_kernels)


class AdditiveSelfAttention(AdditiveAttention):
    """LadaGAN's attention where ModulatedSelfAttention is, with equalized layers and a modulated output like there."""

    def __init__(self, dim, num_heads, w_dim):
        super().__init__(dim, num_heads)
        self.to_qkv, self.to_weight = Linear(dim, 3 * dim), Linear(dim, num_heads)
        self.proj_out = ModulatedLinear(dim, dim, w_dim)

    def forward(self, x, w):
        return self.proj_out(self.mix(x), w)


def tied_dot_product_attention(qk, v):
    """softmax(q·qᵀ/√d)·v, in the place of the discriminator's squared_l2_attention."""
    return (qk @ qk.mT / qk.shape[-1] ** 0.5).softmax(-1) @ v


VARIANTS = {
    "full": lambda preset: preset,
    "router without w": replacing((aurora, "Router", RouterWithoutW)),
    "one expert": levels(num_experts=1),
    "no matching loss": recipe(matching_weight_discriminator=0.0, matching_weight_generator=0.0),
    "no CLIP loss": recipe(clip_weight=0.0),
    "no MTM": replacing((aurora, "DeformableConv2d", UndeformedConv2d)),
    "no adaptive kernels": levels(num_kernels=1),
    "dot-product attention": replacing(
        (aurora, "l2_attention", F.scaled_dot_product_attention),
        (discriminator, "squared_l2_attention", tied_dot_product_attention),
    ),
    "additive self-attention": replacing((aurora, "ModulatedSelfAttention", AdditiveSelfAttention)),
    "not progressive": recipe(images_per_phase={4: 0, 8: 0}),
}

# ----------------------------------------------------------------------------------------------------------------------
# A run, and what came of it.


def run(name, seed, images, folder):
    """Trains a variant in this process, and writes what is measured of it."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    PRESETS["ablation"] = VARIANTS[name](base(images))
    options = f"--preset ablation --steps {images // BATCH} --batch {BATCH} --seed {seed}"
    options += " --workers 0 --device cpu --dtype fp32"
    args = train.parse_args([*options.split(), "--sample-every", str(images), "--out", str(folder / "run")])
    with (
        (folder / "log.txt").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        stopping_when_asked() as asked_to_stop,
    ):
        trained = train.Run(args, torch.device("cpu"), asked_to_stop)
        try:
            trained.train()
        except sources.Stopped:
            return  # and has saved
    result = measure(trained.learner.ema, trained.clip, COUNT) | {
        "seconds": trained.loop.progress.seconds,
        "images": images,
    }
    atomically(folder / "result.json", lambda temporary: temporary.write_text(json.dumps(result), "utf-8"))


def measure(generator, clip, count):
    """→ {measure: of `count` pictures}. Captions are read by the CLIP that no generator saw."""
    extractors = {name: load_extractor(name, "", torch.device("cpu")) for name in ("efficientnet", "judge")}
    resolution = generator.config.levels[-1].resolution
    captions, real, _ = extract_real(sources.open_data("emoji", resolution, 0), count, resolution, extractors)
    captions = captions[:count]
    made = extract_generated(generator, clip, captions, 1.0, 0, resolution, extractors)
    result = compare_images(real["efficientnet"][:count], made["efficientnet"])
    result |= compare_texts(made["judge"], embed(extractors["judge"], captions), captions)
    return {name: result[name] * (1 if name == "FID" else 100) for name in MEASURES}


def run_all(names, seeds, images, out):
    """All runs, as many at a time as there are cores → {variant: [a result for each seed]}."""
    folders = {(name, seed): out / f"{images}" / name.replace(" ", "-") / str(seed) for seed in seeds for name in names}
    missing = [key for key, folder in folders.items() if not (folder / "result.json").is_file()]
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, max_tasks_per_child=1) as pool:
        jobs = [pool.submit(run, *key, images, folders[key]) for key in missing]
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="run", disable=not jobs):
            job.result()
    if stopped := [name for (name, _), folder in folders.items() if not (folder / "result.json").is_file()]:
        raise UserError(f"{len(stopped)} runs were stopped, as of {stopped[0]!r}; the same command goes on with them")
    results = {name: [] for name in names}
    for (name, _), folder in folders.items():
        results[name].append(json.loads((folder / "result.json").read_text("utf-8")))
    return results


def mean_and_spread(values):
    """The mean over a variant's seeds, and where there are several their standard deviation, in words."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def table(results):
    """Markdown: a variant a row, mean ± standard deviation over its seeds."""
    rows = [["", *MEASURES], ["---"] * (len(MEASURES) + 1)]
    for variant, runs in results.items():
        rows.append([variant, *(mean_and_spread([result[name] for result in runs]) for name in MEASURES)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(results, images, path):
    """A panel for each measure, a dot for each seed, a bar at their mean, and a line through that of `full`."""
    figure, panels = plt.subplots(1, len(MEASURES), figsize=(3 * len(MEASURES), 0.7 + 0.35 * len(results)), sharey=True)
    for panel, name in zip(panels, MEASURES, strict=True):
        for y, runs in enumerate(results.values()):
            values = [result[name] for result in runs]
            panel.plot(values, [y] * len(values), "o", color="tab:blue", markersize=4, alpha=0.6)
            panel.plot(statistics.mean(values), y, "|", color="black", markersize=14)
        if "full" in results:
            full = statistics.mean(result[name] for result in results["full"])
            panel.axvline(full, color="gray", linewidth=0.8)
        panel.set_title("FID (less is better)" if name == "FID" else f"{name}, %", fontsize=9)
        panel.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(results)), results)
    panels[0].invert_yaxis()
    seeds = max(map(len, results.values()))
    figure.suptitle(f"One part left out at a time: 16×16, {images:,} images, {seeds} seed(s); bar: mean", fontsize=10)
    figure.tight_layout()
    atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), help="variants to run")
    parser.add_argument("--seeds", type=positive_int, default=3, help="runs of each variant")
    parser.add_argument("--images", type=positive_int, default=16_000, help="training images of a run")
    parser.add_argument("--out", type=a_path, default=Path("runs/ablations"), help="folder of the runs, table and plot")
    args = parser.parse_args()
    with told_in_one_line():
        if unknown := set(args.only) - VARIANTS.keys():
            raise UserError(f"no variant {min(unknown)!r}; choose from: {', '.join(VARIANTS)}")
        if args.images < BATCH:
            raise UserError(f"--images {args.images}: a step takes {BATCH}")
        args.out.mkdir(parents=True, exist_ok=True)
        results = run_all(args.only, range(args.seeds), args.images, args.out)
        print(table(results))
        plot(results, args.images, args.out / "ablations.png")
        minutes = statistics.mean(result["seconds"] for runs in results.values() for result in runs) / 60
        print(f"{minutes:.1f} minutes a run on one core; the plot: {(args.out / 'ablations.png').resolve()}")


if __name__ == "__main__":
    main()
