"""Measures a generator: Fréchet distance, precision and recall, CLIP score, R-precision, each with its protocol.

    python evaluate.py                             # the emoji model
    python evaluate.py --checkpoint runs/mine/generator_ema.safetensors --data my_pictures
    torchrun --nproc-per-node 8 evaluate.py --checkpoint aurora_v1.pth \\
        --data annotations/captions_val2014.json --count 30000 --features inception --clip ViT-g-14:laion2b_s34b_b88k
    python evaluate.py --upsampler models/emoji_upsampler.safetensors   # enlarged by the second stage, and by bicubic

The features are from an EfficientNet; with --features inception the distance is the usual FID. One picture is generated
for the caption of each real image. On the emoji it also measures how often names, tags and held-out words are drawn
right, and how much seeds differ.
"""

import json
import platform
from pathlib import Path

import torch

from common import distributed
from common.cli import (
    MADE_BY,
    Parser,
    UserError,
    a_path,
    a_truncation,
    add_data,
    check_file,
    errors_in_one_line,
    natural_number,
    positive_int,
)
from common.disk import write_text
from data import sources
from data.coco import RESIZER, Coco
from data.emoji import read_emoji
from evaluation import emoji
from evaluation.enlarging import enlarged
from evaluation.extractors import load_extractor
from evaluation.features import OTHERS, drawing, extract_real, measure, measure_real, own_resolution
from evaluation.metrics import CANDIDATES, NEIGHBOURS
from sampling import inference, latent
from weights.generator_file import DEMO, load_generator, load_upsampler


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=a_path, default=DEMO, help="a run, its generator, or the authors' aurora_v1.pth")
    add("--text-clip", help="the large CLIP of the generator, see --clip of sample.py")
    add("--upsampler", type=a_path, help="a second stage, to measure the enlarged images too: a run, or its file")
    add_data(add, ", or COCO's captions_val2014.json")
    add("--images", type=a_path, help="the folder of COCO's images (default: val2014 next to the folder of the JSON)")
    add("--count", type=positive_int, help="generated images (default: 1000, for emoji 2400; for COCO 30000 is usual)")
    add("--resolution", type=positive_int, help="of the compared images (default: that of the last stage)")
    add("--features", default="efficientnet", help="for the FID: efficientnet, inception, inception:FILE, or as --clip")
    add(
        "--clip",
        help="for CLIP score, R-precision: a small CLIP, or MODEL:WEIGHTS (default: that of the run, or judge)",
    )
    add("--truncation", type=a_truncation, default=1.0, help="psi: 1 is all variety")
    add("--seed", type=natural_number, default=0, help="of z, and of the choice of COCO's images")
    add("--out", type=a_path, default=Path("runs/evaluation"), help="folder for evaluation.json")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    folder = args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent
    own = folder / "clip.safetensors"  # if the run trained a CLIP on its captions
    args.clip = args.clip or (str(own) if own.is_file() and args.data != "emoji" else "judge")
    args.count = args.count or (2400 if args.data == "emoji" else 1000)
    return args


def check(args):
    """Raises UserError for mistakes that would otherwise appear after long work."""
    if args.count <= NEIGHBOURS:
        raise UserError(f"--count {args.count}: FID, precision and recall need {NEIGHBOURS + 1} images or more")
    if args.clip.partition(":")[0] in ("inception", "efficientnet"):
        raise UserError(f"--clip {args.clip} cannot read text; give judge or MODEL:WEIGHTS of open_clip")
    check_file(args.out / "evaluation.json")


def open_source(args, resolution):
    """→ the source of real images, and a description of how it crops and resizes them."""
    is_coco = args.data.endswith(".json") and not Path(args.data).is_dir()
    if args.caption_key if is_coco else args.images:
        raise UserError("--images is for COCO's captions, --caption-key for other data; leave it out")
    if is_coco:
        return Coco(args.data, args.images, resolution, args.count, args.seed), RESIZER
    source = sources.open_data(args.data, resolution, args.seed, args.caption_key)
    source.announce()
    return source, "centre crop, then Pillow's Lanczos, JPEGs decoded small"


def describe(args, text_encoder, generator, resolution, resizer, extractors, captions, skipped):
    """The protocol: what the numbers depend on. captions, skipped: see extract_real."""
    own = own_resolution(generator, resolution)
    made = f"its output at {own}×{own}"
    if own != resolution:
        made += f", resized to {resolution}×{resolution} by antialiased bicubic"
    half, candidates = len(captions) // 2, min(CANDIDATES, len(set(captions[: args.count])))
    fewer = f"; with {args.count} it would be lower" if half < args.count else ""
    reader = extractors["clip"].name
    return {
        "generator": f"{args.checkpoint.name}, {made}",
        "second stage": args.upsampler.name if args.upsampler else "none",
        "prompts read by": text_encoder.name,
        "data": Path(args.data).name,
        "images": f"{args.count} real ones, {args.count} generated, one for each caption",
        "real images": resizer,
        "features by": extractors["fid"].name,
        "precision, recall": f"{NEIGHBOURS} nearest neighbours, in the features of the FID",
        "CLIP score by": f"{reader}; the mean cosine",
        "R-precision": f"the share of images whose own caption comes first among {candidates}, by the same network",
        OTHERS: f"of real images: between {half} of them and {half} others{fewer}",
        "skipped": ", ".join(f"{number} {cause}" for cause, number in skipped.items()) or "nothing",
        "seed": args.seed,
        "versions": f"PyTorch {torch.__version__}, Python {platform.python_version()}",
    }


def measure_all(draws, captions, real, args, resolution, extractors):
    """Measures real images and each {name: see features.drawing}, and prints it → {name: {measure: number}}."""
    results = {"real images": measure_real(captions, real, args.count, extractors)}
    for name, draw in draws.items():
        numbers = measure(draw, captions, real, args.count, args.seed, resolution, extractors)
        results[name] = {"ψ": args.truncation, **numbers}
    for name, numbers in results.items():
        distributed.say(f"{name}: {', '.join(f'{what} {value:.4g}' for what, value in numbers.items())}")
    return results


def measure_emoji(draw, args, resolution, extractors):
    """Measures R-precision of words and variety, and prints them → their part of evaluation.json."""
    samples = read_emoji()
    asked = emoji.questions([sample.facts for sample in samples], args.seed)
    shares = emoji.r_precision(draw, asked, args.seed, resolution, extractors["clip"])
    for kind, (share, number) in shares.items():
        distributed.say(f"R-precision of {kind}: {share:.3f} of {number}")
    share, number = emoji.variety(draw, samples, args.seed)
    distributed.say(
        f"Variety: seeds of a name differ {share:.2f} times as much as real pictures of it ({number} names)"
    )
    return {"R-precision of words [share, number]": shares, "variety": share}


def evaluate(args, device):
    with distributed.together():
        check(args)
        generator, text_encoder, _ = load_generator(args.checkpoint, device, args.text_clip)
        upsampler = load_upsampler(args.upsampler, text_encoder, device) if args.upsampler else None
        for network in filter(None, (generator, upsampler)):
            inference.prepare(network)
        resolution = args.resolution or (upsampler or generator).config.resolutions[-1]
        source, resizer = open_source(args, resolution)
        specs = {"fid": args.features, "clip": args.clip}
        extractors = {name: load_extractor(spec, device) for name, spec in specs.items()}
    captions, real, skipped = extract_real(source, args.count, resolution, extractors)
    if note := latent.unread(text_encoder, captions):
        distributed.say(note)
    real = {name: features.to(device) for name, features in real.items()}
    protocol = describe(args, text_encoder, generator, resolution, resizer, extractors, captions, skipped)
    width = max(map(len, protocol))
    for name, value in protocol.items():
        distributed.say(f"  {name:{width}s}  {value}")
    draws = {"generated images": drawing(generator, text_encoder, resolution, args.truncation)}
    if upsampler:
        small = drawing(generator, text_encoder, upsampler.config.input_resolution, args.truncation)
        draws["enlarged by the second stage"] = enlarged(small, upsampler, text_encoder, args.truncation)
    result = {"about": MADE_BY, "protocol": protocol} | measure_all(draws, captions, real, args, resolution, extractors)
    if args.data == "emoji":
        result |= measure_emoji(draws["generated images"], args, resolution, extractors)
    if distributed.is_main():
        path, content = args.out / "evaluation.json", json.dumps(result, indent=2, ensure_ascii=False)
        write_text(path, content)
        print(f"The results with their protocol: {path.resolve()}")


def main():
    args = parse_args()
    with errors_in_one_line(), distributed.ranks(args.device) as device:
        evaluate(args, device)


if __name__ == "__main__":
    main()
