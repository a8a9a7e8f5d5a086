"""Measures a generator as the field does: FID, precision and recall, CLIP score, each with its protocol.

    python evaluate.py                             # the demo model, on the built-in scenes
    python evaluate.py --curve                     # the same at several truncations, and a plot
    torchrun --nproc-per-node 8 evaluate.py --checkpoint aurora_v1.pth \\
        --data annotations/captions_val2014.json --count 30000 --features inception --clip ViT-g-14:laion2b_s34b_b88k

For every real image one picture is drawn, of its caption. On the built-in scenes the judge also says what is right.
"""

import argparse
import collections
import itertools
import json
import platform
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from common import distributed
from common.cli import HelpFormatter, UserError, finite_number, natural_number, positive_int, told_in_one_line
from data import sources
from data.coco import RESIZER, Coco
from data.scenes import make_scene
from evaluation import judge
from evaluation.extractors import clip_score, load_extractor
from evaluation.metrics import fid, precision_recall
from sampling import inference, latent
from weights.checkpoint import DEMO, atomically, load_generator

UNSEEN = 333_334  # a seed of scenes that no run with a usual one draws from
CURVE = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)
NEIGHBOURS = 3


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=type("Help", (HelpFormatter, argparse.RawDescriptionHelpFormatter), {})
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, default=DEMO, help="generator_ema.safetensors of a run, or aurora_v1.pth")
    add("--text-clip", help="where the generator's own large CLIP is, see sample.py's --clip")
    add("--data", default="shapes", help="shapes, COCO's captions_val2014.json, a folder, or .tar shards, as train.py")
    add("--images", type=Path, help="the folder of COCO's images (default: val2014 beside the folder of the JSON)")
    add("--count", type=positive_int, default=1000, help="real images, and pictures; for COCO the field takes 30000")
    add("--resolution", type=positive_int, help="at which both are compared (default: the generator's own)")
    add("--features", default="small", help="small, inception, inception:WEIGHTS.pth, or MODEL:WEIGHTS of open_clip")
    add("--clip", default="small", help="for the CLIP score: small, or MODEL:WEIGHTS of open_clip")
    add("--truncation", type=finite_number, default=1.0, help="psi: 1 is all variety")
    add("--curve", action="store_true", help=f"at truncations {', '.join(map(str, CURVE))}, with a plot")
    add("--seed", type=natural_number, default=0, help="of the latents, and of what is drawn from COCO")
    add("--out", type=Path, default=Path("runs/evaluation"), help="folder for evaluation.json and the plot")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser.parse_args(argv)


def check(args):
    """Fails before the work rather than after it."""
    if args.count <= NEIGHBOURS:
        raise UserError(
            f"--count {args.count}: FID, precision and recall need {NEIGHBOURS + 1} images on either side, or more"
        )
    if args.clip.partition(":")[0] == "inception":
        raise UserError(f"--clip {args.clip} reads no text; give small or MODEL:WEIGHTS of open_clip")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error.strerror}") from error


def open_source(args, resolution):
    """→ the real images, and how they are cut and resized."""
    if args.data.endswith(".json"):
        return Coco(args.data, args.images, resolution, args.count, args.seed), RESIZER
    if args.data == "shapes":
        return sources.open_data("shapes", resolution, UNSEEN), f"rendered at {resolution}×{resolution}"
    source = sources.open_data(args.data, resolution, args.seed)
    return source, "centre crop, then Pillow's Lanczos, JPEGs decoded small"


# ----------------------------------------------------------------------------------------------------------------------
# Features of both sides. The ranks take turns at the batches.


def shared_out(batches, work, total):
    """work(number, batch) for every batch, each done by one rank → all results on every rank, in order."""
    progress = tqdm(batches, total=total, unit="batch", leave=False, disable=not distributed.is_main())
    ranks, rank = distributed.world_size(), distributed.rank()
    with distributed.together():
        mine = {number: work(number, batch) for number, batch in enumerate(progress) if number % ranks == rank}
    everyone = {number: result for part in distributed.collect(mine) for number, result in part.items()}
    return [everyone[number] for number in sorted(everyone)]


def limited(batches, count):
    """The first `count` pairs of a source's batches, the last batch cut. Raises UserError where there are fewer."""
    left = count
    for batch in batches:
        yield batch._replace(images=batch.images[:left], captions=batch.captions[:left])
        left -= len(batch.captions[:left])
        if left == 0:
            return
    raise UserError(f"--count {count}: the data holds {count - left} usable images; ask for no more")


def to_pixels(images, resolution):
    """Images [B, 3, R, R] in [−1, 1] → uint8, as a file would hold them, at a resolution."""
    if images.shape[-1] != resolution:
        images = torch.nn.functional.interpolate(images, resolution, mode="bicubic", antialias=True)
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@torch.no_grad()
def look_at_reals(batches, count, resolution, extractors):
    """→ captions, the extractors' features of the images {spec: [N, D]}, and what was passed over, by cause."""

    def work(_, batch):
        return batch.captions, look(to_pixels(batch.images, resolution), extractors), batch.skipped

    captions, features, skipped = zip(*shared_out(limited(batches, count), work, None), strict=True)
    return list(itertools.chain(*captions)), joined(features), sum(skipped, collections.Counter())


@torch.no_grad()
def look_at_fakes(generator, clip, captions, psi, seed, resolution, extractors):
    """One picture for each caption, at truncation psi → the extractors' features of them, {spec: [N, D]}."""
    z = latent.noise(generator, len(captions), seed)
    numbers = torch.arange(len(captions)).split(latent.BATCH)

    def work(_, mine):
        prompt = latent.read(generator, clip, [captions[i] for i in mine])
        w = generator.mapping(z[mine], prompt.global_text)
        if psi != 1:
            w = latent.truncate(w, latent.mean_code(generator, prompt.global_text), psi)
        pixels = to_pixels(latent.pictures(generator, w, prompt.local_text), resolution)
        return look(pixels, extractors)

    return joined(shared_out(numbers, work, len(numbers)))


def look(pixels, extractors):
    return {spec: extractor.images(pixels).cpu() for spec, extractor in extractors.items()}


def joined(batches):
    """[{spec: features}, …] → {spec: features of all}."""
    return {spec: torch.cat([features[spec] for features in batches]) for spec in batches[0]}


def compare(real, fake):
    """Features of both sides [N, D] → FID, precision and recall. Raises UserError where they can mean nothing."""
    if real.shape == fake.shape and torch.equal(real, fake):
        raise UserError(
            "both sides are the same images, so that a distance between them says nothing; give other --data"
        )
    precision, recall = precision_recall(real, fake, NEIGHBOURS)
    return {"FID": fid(real, fake), "precision": precision, "recall": recall}


# ----------------------------------------------------------------------------------------------------------------------
# What is told.


def print_protocol(protocol):
    width = max(map(len, protocol))
    for name, value in protocol.items():
        print(f"  {name:{width}s}  {value}")


def plot_curve(points, protocol, path):
    """FID against CLIP score, a point for each truncation."""
    figure, panel = plt.subplots(figsize=(6.4, 5.4))
    scores, fids = ([point[name] for point in points] for name in ("CLIP score", "FID"))
    panel.plot(scores, fids, "o-")
    for point in points:
        place = point["CLIP score"], point["FID"]
        panel.annotate(f"ψ {point['ψ']}", place, xytext=(6, 5), textcoords="offset points", fontsize=8)
    panel.set_xlabel(f"CLIP score, {protocol['CLIP score by'].split(',')[0]}", fontsize=8)
    panel.set_ylabel(f"FID, {protocol['features by'].split(',')[0]}", fontsize=8)
    panel.set_title(f"{protocol['generator']}\n{protocol['data']}, {protocol['images']}", fontsize=8)
    panel.margins(x=0.12)
    figure.tight_layout()
    atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def print_verdict(generator, clip, count):
    """What the judge says of pictures of its own prompts, whatever --truncation, and in brackets of rendered scenes."""
    reader = judge.load()
    verdict = judge.verdict(reader, generator, clip, count)
    for kind, (drawn, rendered) in verdict.items():
        print(f"{count} prompts with {kind}, ψ 1: % right (of rendered scenes)")
        for name in drawn:
            print(f"  {name:16s} {100 * drawn[name]:5.1f}  ({100 * rendered[name]:.1f})")
    moved = judge.spread(reader, generator, clip)
    print(f"Spread of positions over seeds, as a share of that in scenes: {moved:.2f}")
    captions = [make_scene(i, judge.UNSEEN).caption for i in range(count)]
    _, loads = judge.sample(generator, clip, captions, seed=2)
    for name, shares in loads.items():
        print(f"Experts at {name}, % of the points:", *[f"{100 * share:.1f}" for share in shares])
    return {kind: drawn for kind, (drawn, _) in verdict.items()} | {"spread": moved}


def describe(args, clip, own, resolution, resizer, extractors):
    """The protocol: what a number depends on beside the generator."""
    enlarged = f", resized to {resolution}×{resolution} by antialiased bicubic" if resolution != own else ""
    return {
        "generator": f"{args.checkpoint.name}, {own}×{own}{enlarged}",
        "prompts read by": clip.name,
        "data": Path(args.data).name,
        "images": f"{args.count} real ones, {args.count} pictures, one for each caption",
        "real images": resizer,
        "features by": extractors[args.features].name,
        "CLIP score by": f"{extractors[args.clip].name}; the mean cosine",
        "precision, recall": f"{NEIGHBOURS} nearest neighbours, in the features of the FID",
        "seed": args.seed,
        "versions": f"PyTorch {torch.__version__}, Python {platform.python_version()}",
    }


def evaluate(args, device):
    with distributed.together():
        check(args)
    generator, clip, _ = load_generator(args.checkpoint, device, args.text_clip)
    inference.prepare(generator)
    own = generator.config.levels[-1].resolution
    resolution = args.resolution or own
    with distributed.together():
        source, resizer = open_source(args, resolution)
        options = {args.clip: "--clip", args.features: "--features"}  # one where they are the same
        extractors = {spec: load_extractor(spec, option, device) for spec, option in options.items()}
    protocol = describe(args, clip, own, resolution, resizer, extractors)
    captions, real, skipped = look_at_reals(source.evaluation(), args.count, resolution, extractors)
    protocol["passed over"] = ", ".join(f"{number} {cause}" for cause, number in skipped.items()) or "nothing"
    with torch.no_grad():
        read = extractors[args.clip].texts
        texts = torch.cat([read(captions[i : i + 64]).cpu() for i in range(0, len(captions), 64)])
    protocol["CLIP score of the real pairs"] = f"{clip_score(real[args.clip], texts):.4f}"
    if distributed.is_main():
        print_protocol(protocol)
    points = []
    for psi in CURVE if args.curve else [args.truncation]:
        fake = look_at_fakes(generator, clip, captions, psi, args.seed, resolution, extractors)
        distances = compare(*(side[args.features].to(device) for side in (real, fake)))
        points.append({"ψ": psi, **distances, "CLIP score": clip_score(fake[args.clip], texts)})
        distributed.say(", ".join(f"{name} {value:.4g}" for name, value in points[-1].items()))
    if distributed.is_main():
        conclude(args, protocol, points, generator, clip)


def conclude(args, protocol, points, generator, clip):
    """The judge's verdict, where it can read the pictures, and the files."""
    result = {"protocol": protocol, "results": points}
    if args.data == "shapes" and generator.config.levels[-1].resolution in judge.RESOLUTIONS:
        result["judge, ψ 1"] = print_verdict(generator, clip, args.count)
    written = args.out / "evaluation.json"
    try:
        atomically(written, lambda temporary: temporary.write_text(json.dumps(result, indent=2, ensure_ascii=False)))
        if args.curve:
            plot_curve(points, protocol, args.out / "curve.png")
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error.strerror}") from error
    print(f"All of it, with its protocol: {written.resolve()}" + (", and curve.png beside it" if args.curve else ""))


def main():
    args = parse_args()
    with told_in_one_line():
        device = distributed.start(args.device)
        try:
            with distributed.losses_told():
                evaluate(args, device)
        finally:
            distributed.stop()


if __name__ == "__main__":
    main()
