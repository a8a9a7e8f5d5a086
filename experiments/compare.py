"""Holds text-to-image systems against each other: what they cost, and how good their pictures are.

    python -m experiments.compare Aurora=runs/emoji StyleGAN-T=runs/stylegan_t \\
        LadaGAN=runs/ladagan Muse=runs/muse

A system is Aurora, or one of baselines/, as a run's folder or its generator_ema.safetensors. All draw the same
captions, and are measured by the networks of evaluate.py. Times are those of the processor, so that others who use the
machine do not count. The table, its numbers as JSON and a picture go to --out.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from aurora import Generator
from baselines.command import load, system_of, takes
from common.cli import (
    HelpFormatter,
    UserError,
    a_path,
    add_data,
    natural_number,
    positive_int,
    told_in_one_line,
)
from common.disk import atomically
from data import sources
from discriminator import Discriminator
from evaluation.extractors import load_extractor
from evaluation.features import BATCH, embed, extract, extract_real, own_resolution, to_pixels
from evaluation.metrics import NEIGHBOURS, clip_score, compare_images, compare_texts, fid
from experiments.stopwatch import peak_memory, processor_seconds
from presets import PRESETS
from sampling import inference, latent
from sampling.pictures import grid, in_range, to_pil
from training.plan import FlopCounter
from weights.checkpoint import generator_of, load_generator

PROMPTS = ("red heart", "grinning face", "fox", "hot dog", "red apple", "automobile", "sun", "man astronaut")
TRUNCATIONS, SEEDS = (1.0, 0.5, 0.0), 8  # the rows of the second table, and pictures of each prompt in it
OTHERS = "Fréchet distance to other real pictures"
AS_READ = "the same, seen by what reads captions"


@dataclass
class Entry:
    """A trained system, ready to draw.

    draw: captions, seed, ψ → images [B, 3, R, R] in [−1, 1]; ψ is left out where a system has no truncation.
    """

    draw: Callable
    truncates: bool
    sampling: int  # parameters that drawing needs
    trained: int | None  # parameters that learned, the discriminator's too
    notes: dict  # of the run that trained it


# ----------------------------------------------------------------------------------------------------------------------
# Getting the systems.


def open_system(path, resolution):
    """A generator_ema.safetensors of Aurora or of a baseline → Entry. Raises UserError."""
    system_class = system_of(path)
    return open_baseline(system_class, path) if system_class else open_aurora(path, resolution)


def open_aurora(path, resolution):
    generator, clip, notes = load_generator(path)
    inference.prepare(generator)
    own = own_resolution(generator, resolution)

    @torch.no_grad()
    def draw(captions, seed, *psi):
        z = latent.noise(generator, len(captions), seed)
        (output,) = latent.generate(generator, clip, captions, z, own, *psi, batch=len(captions))
        return in_range(output.image)

    trained = None
    if preset := PRESETS.get(notes.get("preset")):
        with torch.device("meta"):
            trained = count(Generator(preset.generator), Discriminator(preset.discriminator))
    return Entry(draw, True, count(generator), trained, notes)


def open_baseline(system_class, path):
    system, notes = load(system_class, path)

    @torch.no_grad()
    def draw(captions, seed, *psi):
        text = system.clip.read(captions)
        return system.sample(text, seed, 1, *psi)

    learning = [network for name, network in system.networks.items() if name != "ema"]
    sampling = [system.networks[name] for name in system.for_sampling]
    return Entry(draw, takes(system.sample, "truncation"), count(*sampling), count(*learning), notes)


def count(*networks):
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# What is measured.


def measure_training(entry, path):
    """Images and hours until the generator was saved: of the processor where the log knows them, else of the clock."""
    notes = entry.notes
    seconds, log = notes.get("seconds"), path.parent / "metrics.jsonl"
    if log.is_file():
        rows = [row for row in read_log(log) if row["step"] <= notes["step"]]
        seconds = sum(row.get("cpu_seconds", row["seconds"]) for row in rows)
    return {
        "training images, thousands": notes.get("images", 0) / 1e3,
        "training, hours": (seconds or 0) / 3600,
        "parameters trained, M": entry.trained and entry.trained / 1e6,
    }


def read_log(path):
    """A metrics.jsonl → its rows. Raises UserError."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as the log of a run ({error})") from error


def measure_sampling(entry):
    """What a picture costs, from its caption on."""
    few, many = (lambda size=size: entry.draw(PROMPTS[:1] * size, 0) for size in (1, BATCH))
    with FlopCounter() as counter:
        few()
    return {
        "parameters of sampling, M": entry.sampling / 1e6,
        "GFLOP a picture": counter.total / 1e9,
        "ms a picture, batch 1": 1e3 * processor_seconds(few),
        f"ms a picture, batch {BATCH}": 1e3 * processor_seconds(many) / BATCH,
        f"peak memory, batch {BATCH}, MB": peak_memory(many) / 2**20,
    }


def measure_pictures(entry, captions, real, args, extractors):
    """Distances to the real pictures, and whether captions are followed.

    real: {extractor: features of the captions' own pictures, and of as many others where the data holds them}.
    """

    def pixels():
        for first in range(0, args.count, BATCH):
            yield to_pixels(entry.draw(captions[first : first + BATCH], args.seed + first), args.resolution)

    parts = extract(pixels(), extractors, -(-args.count // BATCH))
    made = {name: torch.cat(features) for name, features in parts.items()}
    result = compare_images(real["efficientnet"][: args.count], made["efficientnet"])
    return {
        "Fréchet distance": result.pop("FID"),
        **distances_to_others(real, made, args.count),
        **result,
        **compare_texts(made["judge"], embed(extractors["judge"], captions), captions),
    }


def measure_real(captions, real, args, extractors):
    """The same of real pictures, as far as it can be told."""
    own = {name: features[: args.count] for name, features in real.items()}
    texts = compare_texts(own["judge"], embed(extractors["judge"], captions), captions)
    return distances_to_others(real, own, args.count) | texts


def distances_to_others(real, features, count):
    """From the features of `count` pictures to those of other real ones than the captions' own, by both networks.

    By two, since a system that learned through one of them is flattered by it (Kynkäänniemi et al. 2022).
    """
    return {
        measure: fid(real[name][count:], features[name]) if len(real[name]) == 2 * count else None
        for measure, name in ((OTHERS, "efficientnet"), (AS_READ, "judge"))
    }


@torch.no_grad()
def measure_truncation(entry, args, reader):
    """{ψ: (the pictures' standard deviation over seeds, their mean cosine to their caption)} for the prompts."""
    result, texts = {}, reader.texts(args.prompts)
    for psi in TRUNCATIONS if entry.truncates else ():
        images = [entry.draw([prompt] * SEEDS, args.seed, psi) for prompt in args.prompts]
        seen = [reader.images(to_pixels(those, args.resolution)) for those in images]
        cosines = [clip_score(those, text.expand_as(those)) for those, text in zip(seen, texts, strict=True)]
        deviations = [those.std(0).mean().item() for those in images]
        result[psi] = statistics.fmean(deviations), statistics.fmean(cosines)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# What is told.


def markdown(rows):
    """Lists of texts → a table, the first row its head."""
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def shown(value):
    """A number in three digits or more; — for none."""
    return "—" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(columns):
    """{system: {measure: number}} → markdown, a measure a row."""
    measures = dict.fromkeys(measure for column in columns.values() for measure in column)
    cells = [[measure, *(shown(column.get(measure)) for column in columns.values())] for measure in measures]
    return markdown([["", *columns], *cells])


def truncation_table(results):
    """{system: {ψ: (deviation, cosine)}} → markdown, a system that truncates a row."""
    head = ["standard deviation over seeds, cosine to the caption", *(f"ψ = {psi:g}" for psi in TRUNCATIONS)]
    cells = [[name, *(f"{d:.3f}, {c:.3f}" for d, c in values.values())] for name, values in results.items() if values]
    return markdown([head, *cells])


def describe(args, paths, extractors):
    """The protocol."""
    size = f"{args.resolution}×{args.resolution}"
    return {
        "systems": ", ".join(f"{name} {path}" for name, path in paths.items()),
        "pictures": f"{args.data}, {args.count} real ones and {args.count} of each system, one a caption, at {size}",
        "distances, precision, recall": f"{extractors['efficientnet'].name}; {NEIGHBOURS} nearest neighbours",
        "captions read by": extractors["judge"].name,
        "times": f"of the processor, {torch.get_num_threads()} thread(s), PyTorch {torch.__version__}",
    }


@torch.no_grad()
def picture(entries, args):
    """A row for each system, a column for each prompt."""
    panels, captions = [], []
    for name, entry in entries.items():
        pixels = to_pixels(entry.draw(args.prompts, args.seed), args.resolution)
        panels += [to_pil(image / 127.5 - 1) for image in pixels]
        captions += [f"{name}: {prompt}" for prompt in args.prompts]
    return grid(panels, captions, len(args.prompts))


def compare(args):
    """→ the tables and the protocol as markdown, their numbers, and the picture."""
    paths = {name: generator_of(path) for name, path in args.systems}
    entries = {name: open_system(path, args.resolution) for name, path in paths.items()}
    extractors = {name: load_extractor(name, "", torch.device("cpu")) for name in ("efficientnet", "judge")}
    source = sources.open_data(args.data, args.resolution, args.seed, args.caption_key)
    captions, real, _ = extract_real(source, args.count, args.resolution, extractors)
    captions = captions[: args.count]
    columns, truncated = {}, {}
    for name, entry in entries.items():
        columns[name] = measure_training(entry, paths[name]) | measure_sampling(entry)
        columns[name] |= measure_pictures(entry, captions, real, args, extractors)
        truncated[name] = measure_truncation(entry, args, extractors["judge"])
        print(f"{name}: {', '.join(f'{what} {shown(value)}' for what, value in columns[name].items())}", flush=True)
    columns["real pictures"] = measure_real(captions, real, args, extractors)
    protocol = describe(args, paths, extractors)
    text = f"{table(columns)}\n\n{truncation_table(truncated)}\n\n"
    text += "".join(f"- {name}: {value}\n" for name, value in protocol.items())
    numbers = {"protocol": protocol, "results": columns, "truncation": truncated}
    return text, numbers, picture(entries, args)


def named_system(text):
    """NAME=PATH → both."""
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(f"{text}: write NAME=PATH, as StyleGAN-T=runs/stylegan_t")
    return name, path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    add = parser.add_argument
    add("systems", nargs="+", type=named_system, metavar="NAME=PATH", help="a run's folder, or its generator")
    add_data(add)
    add("--count", type=positive_int, default=2400, help="pictures of each system, beside twice as many real ones")
    add("--resolution", type=positive_int, default=32, help="to which all pictures are brought")
    add("--prompts", nargs="+", default=PROMPTS, help="of the picture and of the table of truncation")
    add("--seed", type=natural_number, default=0)
    add("--out", type=a_path, default=Path("runs/compare"), help="folder for compare.md, compare.json and compare.png")
    args = parser.parse_args()
    with told_in_one_line():
        if args.count <= NEIGHBOURS:
            raise UserError(f"--count {args.count}: precision and recall need {NEIGHBOURS + 1} pictures or more")
        args.out.mkdir(parents=True, exist_ok=True)
        text, results, drawn = compare(args)
        print(text)
        written = json.dumps(results, indent=1, ensure_ascii=False)
        atomically(args.out / "compare.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))
        atomically(args.out / "compare.json", lambda temporary: temporary.write_text(written, encoding="utf-8"))
        atomically(args.out / "compare.png", lambda temporary: drawn.save(temporary, "PNG"))
        print(f"All of it is in {args.out.resolve()}")


if __name__ == "__main__":
    main()
