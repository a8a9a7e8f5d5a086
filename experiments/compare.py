"""Compares text-to-image systems on the emoji: their cost and the quality of their pictures.

    python -m experiments.compare Aurora=runs/emoji StyleGAN-T=runs/stylegan_t \\
        LadaGAN=runs/ladagan Muse=runs/muse

A system is Aurora or one of baselines/: a run's folder or its generator_ema.safetensors. All draw the same captions and
are measured with the networks of evaluate.py. Times of sampling are processor time, so other processes do not count.
The table, its numbers as JSON and a picture go to --out.
"""

import argparse
import functools
import json
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from baselines.shared import drawing_networks, load, system_of
from common.cli import MADE_BY, Parser, UserError, a_path, check_file, errors_in_one_line, positive_int
from common.disk import write_text
from data import sources
from data.emoji import read_emoji
from evaluation import emoji
from evaluation.extractors import load_extractor
from evaluation.features import BATCH, drawing, extract_real, measure, measure_real, own_resolution, to_pixels
from evaluation.metrics import NEIGHBOURS
from sampling import inference
from sampling.files import check_picture, save
from sampling.pictures import grid, to_pil
from sampling.pipeline import up_to
from training.plan import FlopCounter
from weights.generator_file import generator_of, load_generator

PROMPTS = ["red heart", "grinning face", "fox", "hot dog", "red apple", "automobile", "sun", "man astronaut"]
NAMES = 50  # for the variety


class Entry(NamedTuple):
    """A trained system, ready to draw."""

    draw: Callable  # see features.drawing
    parameters: int  # of the networks in its file; of Muse also the VQGAN's encoder, which sampling does not use
    notes: dict  # of the run that trained it


def open_system(path, resolution):
    """A generator_ema.safetensors of Aurora or of a baseline → Entry. Raises UserError."""
    system_class = system_of(path)
    return open_baseline(system_class, path) if system_class else open_aurora(path, resolution)


def open_aurora(path, resolution):
    generator, text_encoder, notes = load_generator(path)
    generator, _ = up_to(own_resolution(generator, resolution), generator, None)
    inference.prepare(generator)
    return Entry(drawing(generator, text_encoder, resolution), count(generator), notes)


def open_baseline(system_class, path):
    system, notes = load(system_class, path)

    @torch.no_grad()
    def draw(captions, seed):
        for first in range(0, len(captions), BATCH):
            yield system.sample(system.clip.read(captions[first : first + BATCH]), seed + first, 1)

    return Entry(draw, count(drawing_networks(system)), notes)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def measure_cost(entry):
    """The cost of training, and of a picture, without reading its caption."""

    def draw(size):
        return list(entry.draw(PROMPTS[:1] * size, 0))

    def milliseconds(size):
        """The minimum processor time for a picture; time of other processes does not count."""
        return 1e3 * min(timeit.repeat(lambda: draw(size), timer=time.process_time, repeat=3, number=1)) / size

    draw(1)  # reads the caption, which is cached then
    with FlopCounter() as counter:
        draw(1)
    return {
        "training images, thousands": entry.notes.get("images", 0) / 1e3,
        "training, hours": entry.notes.get("seconds", 0) / 3600,
        "parameters of sampling, M": entry.parameters / 1e6,
        "GFLOP a picture": counter.total / 1e9,
        "ms a picture, batch 1": milliseconds(1),
        f"ms a picture, batch {BATCH}": milliseconds(BATCH),
    }


@functools.cache
def real_emoji(count, resolution):
    """→ the extractors, and the captions and features of extract_real for the emoji."""
    networks = {"fid": "efficientnet", "clip": "judge"}
    extractors = {name: load_extractor(spec, torch.device("cpu")) for name, spec in networks.items()}
    captions, real, _ = extract_real(sources.open_data("emoji", resolution, 0), count, resolution, extractors)
    return extractors, captions, real


def compare(args):
    """→ {system: {measure: number}}, and the picture: a row for each system, a column for each of PROMPTS."""
    paths = {name: generator_of(path) for name, path in args.systems}
    entries = {name: open_system(path, args.resolution) for name, path in paths.items()}
    extractors, captions, real = real_emoji(args.count, args.resolution)
    samples, columns, panels, titles = read_emoji(), {}, [], []
    for name, entry in entries.items():
        columns[name] = measure_cost(entry)
        columns[name] |= measure(entry.draw, captions, real, args.count, 0, args.resolution, extractors)
        columns[name]["variety"], _ = emoji.variety(entry.draw, samples, 0, NAMES)
        print(f"{name}: {', '.join(f'{what} {shown(value)}' for what, value in columns[name].items())}", flush=True)
        drawn = torch.cat([to_pixels(images, args.resolution) for images in entry.draw(PROMPTS, 0)])
        panels += [to_pil(image / 127.5 - 1) for image in drawn]
        titles += [f"{name}: {prompt}" for prompt in PROMPTS]
    columns["real pictures"] = measure_real(captions, real, args.count, extractors)
    return columns, grid(panels, titles, len(PROMPTS))


def markdown(rows):
    """Rows of texts → a Markdown table with the first row as its head."""
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def shown(value):
    """A number rounded to three digits, or to a whole number from 100 on; — for None."""
    if value is None:
        return "—"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(columns):
    """{system: {measure: number}} → Markdown, one row for each measure."""
    measures = dict.fromkeys(measure for column in columns.values() for measure in column)
    cells = [[measure, *(shown(column.get(measure)) for column in columns.values())] for measure in measures]
    return markdown([["", *columns], *cells])


def named_system(text):
    """NAME=PATH → both."""
    name, _, path = text.partition("=")
    if not (name and path):
        raise argparse.ArgumentTypeError(f"{text}: write NAME=PATH, for example StyleGAN-T=runs/stylegan_t")
    return name, path


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("systems", nargs="+", type=named_system, metavar="NAME=PATH", help="a run's folder, or its generator")
    add("--count", type=positive_int, default=2400, help="pictures of each system; real ones are twice as many")
    add("--resolution", type=positive_int, default=32, help="to which all pictures are resized")
    add("--out", type=a_path, default=Path("runs/compare"), help="folder for compare.md, compare.json and compare.png")
    args = parser.parse_args()
    with errors_in_one_line():
        if args.count <= NEIGHBOURS:
            raise UserError(f"--count {args.count}: precision and recall need {NEIGHBOURS + 1} pictures or more")
        if len(dict(args.systems)) < len(args.systems):
            raise UserError("two systems have the same NAME; give each its own")
        for name in ("compare.md", "compare.json"):
            check_file(args.out / name)
        check_picture(args.out / "compare.png")
        columns, picture = compare(args)
        print(table(columns))
        numbers = json.dumps({"about": MADE_BY, "systems": columns}, indent=1, ensure_ascii=False)
        write_text(args.out / "compare.md", f"<!-- {MADE_BY} -->\n\n{table(columns)}\n")
        write_text(args.out / "compare.json", numbers)
        save([picture], args.out / "compare.png", dict(args.systems))
        print(f"The table, its numbers and a picture are in {args.out.resolve()}")


if __name__ == "__main__":
    main()
