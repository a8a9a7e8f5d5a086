"""Measures a generator: Fréchet distance, precision and recall, CLIP score, R-precision, each with its protocol.

    python evaluate.py                             # the emoji model
    python evaluate.py --checkpoint runs/mine/generator_ema.safetensors --data my_pictures
    torchrun --nproc-per-node 8 evaluate.py --checkpoint aurora_v1.pth \\
        --data annotations/captions_val2014.json --count 30000 --features inception --clip ViT-g-14:laion2b_s34b_b88k

The features are an EfficientNet's; with --features inception the distance is the FID of the field. One picture is
generated for the caption of each real image. On the emoji also how often names, tags and held-out words are drawn
right, and how much seeds differ.
"""

import argparse
import json
import platform
from pathlib import Path

import torch

from common import distributed
from common.cli import (
    HelpFormatter,
    UserError,
    a_path,
    add_data,
    finite_number,
    natural_number,
    positive_int,
    told_in_one_line,
)
from common.disk import atomically
from data import sources
from data.coco import RESIZER, Coco
from evaluation import emoji
from evaluation.extractors import load_extractor
from evaluation.features import embed, extract_generated, extract_real, own_resolution
from evaluation.metrics import CANDIDATES, NEIGHBOURS, compare_images, compare_texts, fid, fid_of_halves
from sampling import inference
from weights.checkpoint import DEMO, load_generator

OTHERS = "FID to other real images"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=type("Help", (HelpFormatter, argparse.RawDescriptionHelpFormatter), {})
    )
    add = parser.add_argument
    add("--checkpoint", type=a_path, default=DEMO, help="generator_ema.safetensors, or aurora_v1.pth")
    add("--text-clip", help="where the generator's own large CLIP is, see sample.py's --clip")
    add_data(add, ", or COCO's captions_val2014.json")
    add("--images", type=a_path, help="the folder of COCO's images (default: val2014 beside the folder of the JSON)")
    add("--count", type=positive_int, help="generated images (default: 1000, for emoji 2400; on COCO 30000 is usual)")
    add("--resolution", type=positive_int, help="of the images that are compared (default: the generator's own)")
    add("--features", default="efficientnet", help="for the FID: efficientnet, inception, inception:FILE, or as --clip")
    add("--clip", help="of CLIP score, R-precision: a small CLIP, or MODEL:WEIGHTS (default: the run's own, or judge)")
    add("--truncation", type=finite_number, default=1.0, help="psi: 1 is all variety")
    add("--seed", type=natural_number, default=0, help="of the latents, and of what is drawn from COCO")
    add("--out", type=a_path, default=Path("runs/evaluation"), help="folder for evaluation.json")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    folder = args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent
    own = folder / "clip.safetensors"  # of a run that trained one on its captions
    args.clip = args.clip or (str(own) if own.is_file() and args.data != "emoji" else "judge")
    args.count = args.count or (2400 if args.data == "emoji" else 1000)
    return args


def check(args):
    """Raises UserError for mistakes that would otherwise show after the work."""
    if args.count <= NEIGHBOURS:
        raise UserError(f"--count {args.count}: FID, precision and recall need {NEIGHBOURS + 1} images or more")
    if args.clip.partition(":")[0] in ("inception", "efficientnet"):
        raise UserError(f"--clip {args.clip} reads no text; give judge or MODEL:WEIGHTS of open_clip")
    args.out.mkdir(parents=True, exist_ok=True)


def open_source(args, generator, resolution):
    """→ the source of real images, and in words how these are cut and resized.

    Real images to be compared with a lower output of the generator are read at its highest resolution, as in training.
    """
    highest = generator.config.levels[-1].resolution
    averaged = own_resolution(generator, resolution) == resolution < highest
    size = highest if averaged else resolution
    if args.data.endswith(".json"):
        source, resizer = Coco(args.data, args.images, size, args.count, args.seed), RESIZER
    else:
        source = sources.open_data(args.data, size, args.seed, args.caption_key)
        resizer = "centre crop, then Pillow's Lanczos, JPEGs decoded small"
    then = f"; from {size}×{size} averaged down as in training" if averaged else ""
    return source, resizer + then


def describe(args, clip, generator, resolution, resizer, extractors):
    """The protocol: what the numbers depend on beside the generator."""
    highest, own = generator.config.levels[-1].resolution, own_resolution(generator, resolution)
    made = f"{highest}×{highest}"
    if own != highest:
        made += f", of which its own output at {own}×{own}, not resized"
    elif resolution != own:
        made += f", resized to {resolution}×{resolution} by antialiased bicubic"
    return {
        "generator": f"{args.checkpoint.name}, {made}",
        "prompts read by": clip.name,
        "data": Path(args.data).name,
        "images": f"{args.count} real ones, {args.count} generated, one for each caption",
        "real images": resizer,
        "features by": extractors[args.features].name,
        "precision, recall": f"{NEIGHBOURS} nearest neighbours, in the features of the FID",
        "seed": args.seed,
        "versions": f"PyTorch {torch.__version__}, Python {platform.python_version()}",
    }


def describe_real(args, captions, skipped, extractors):
    """The part of the protocol that is known once the real images are read."""
    half, candidates = len(captions) // 2, min(CANDIDATES, len(set(captions[: args.count])))
    fewer = f"; with {args.count} it would be lower" if half < args.count else ""
    return {
        "CLIP score by": f"{extractors[args.clip].name}; the mean cosine",
        "R-precision": f"the share of images whose own caption comes first among {candidates}, by the same network",
        OTHERS: f"of real images: between {half} of them and {half} others{fewer}",
        "passed over": ", ".join(f"{number} {cause}" for cause, number in skipped.items()) or "nothing",
    }


# ----------------------------------------------------------------------------------------------------------------------
# What is measured.


def measure_emoji(args, generator, text, resolution, extractors):
    """R-precision of words, and variety, printed → what evaluation.json holds of them."""
    pictures = list(emoji.read_emoji())
    asked = emoji.questions([facts for facts, _ in pictures], args.seed)
    shares = emoji.r_precision(generator, text, asked, args.truncation, args.seed, resolution, extractors[args.clip])
    for kind, (share, number) in shares.items():
        distributed.say(f"R-precision of {kind}: {share:.3f} of {number}")
    share, number = emoji.variety(generator, text, pictures, args.truncation, args.seed)
    distributed.say(
        f"Variety: seeds of a name differ {share:.2f} times as much as real pictures of it ({number} names)"
    )
    return {"R-precision of words [share, number]": shares, "variety": share}


def measure(args, generator, clip, captions, real, resolution, extractors, device):
    """All numbers of generated images, and those of real images, printed → {side: of it}.

    The FID is to the real images whose captions were drawn, as in the field. The FID to other real images is the one to
    hold against that between two sets of real images, which have no captions in common either.
    """
    real_features = real[args.features].to(device)
    others = real_features[args.count :]
    captions = captions[: args.count]
    texts = embed(extractors[args.clip], captions)
    fake = extract_generated(generator, clip, captions, args.truncation, args.seed, resolution, extractors)
    fake_features = fake[args.features].to(device)
    result = {"ψ": args.truncation, **compare_images(real_features[: args.count], fake_features)}
    result |= {OTHERS: fid(others, fake_features)} if len(others) == args.count else {}
    result |= compare_texts(fake[args.clip], texts, captions)
    distributed.say(", ".join(f"{name} {value:.4g}" for name, value in result.items()))
    of_real = {OTHERS: fid_of_halves(real_features)}
    of_real |= compare_texts(real[args.clip][: args.count], texts, captions)
    distributed.say(f"Real images: {', '.join(f'{name} {value:.4g}' for name, value in of_real.items())}")
    return {"results": result, "of real images": of_real}


def evaluate(args, device):
    with distributed.together():
        check(args)
        generator, clip, _ = load_generator(args.checkpoint, device, args.text_clip)
        inference.prepare(generator)
        resolution = args.resolution or generator.config.levels[-1].resolution
        source, resizer = open_source(args, generator, resolution)
        options = {args.clip: "--clip", args.features: "--features"}  # one where they are the same
        extractors = {spec: load_extractor(spec, option, device) for spec, option in options.items()}
    captions, real, skipped = extract_real(source, args.count, resolution, extractors)
    protocol = describe(args, clip, generator, resolution, resizer, extractors)
    protocol |= describe_real(args, captions, skipped, extractors)
    if distributed.is_main():
        print_protocol(protocol)
    result = {"protocol": protocol}
    result |= measure(args, generator, clip, captions, real, resolution, extractors, device)
    if args.data == "emoji":
        result |= measure_emoji(args, generator, clip, resolution, extractors)
    if distributed.is_main():
        write(args, result)


# ----------------------------------------------------------------------------------------------------------------------
# What is told.


def print_protocol(protocol):
    width = max(map(len, protocol))
    for name, value in protocol.items():
        print(f"  {name:{width}s}  {value}")


def write(args, result):
    path, content = args.out / "evaluation.json", json.dumps(result, indent=2, ensure_ascii=False)
    atomically(path, lambda temporary: temporary.write_text(content, "utf-8"))
    print(f"All of it, with its protocol: {path.resolve()}")


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
