"""What can be measured on the emoji alone: whether words are drawn as what they name, and how much seeds differ.

data/make_emoji.py says which pictures are held out, and why.
"""

import gzip
import io
import json
import tarfile
from collections import Counter, defaultdict

import numpy as np
import torch

from data.pairs import read_image
from data.sources import EMOJI
from evaluation.extractors import Extractor
from evaluation.features import embed, extract_generated, to_pixels
from evaluation.metrics import own_caption_first
from layers import resize

SEEDS = 8  # pictures of each name, of which the variety is measured
FEWEST = 4  # real pictures of a name, to be compared with
SIDE = 8  # pixels, at which pictures differ in shapes and colours, and flaws do not count
WORDS = 400  # names, and tags, that are drawn


def read_emoji(path=EMOJI):
    """→ (facts, svg) of every picture in the shard: what its .json says, and the bytes of its .svg."""
    with gzip.open(path) as file, tarfile.open(fileobj=file) as tar:
        svg = None
        for member in tar:
            if member.name.endswith(".svg"):
                svg = tar.extractfile(member).read()
            elif member.name.endswith(".json"):
                yield json.load(tar.extractfile(member)), svg


def questions(emoji, seed):
    """The facts of all pictures → (kind, prompt, answer) of what is asked.

    Of a prompt's picture, the answer is to be nearer than other answers: of a name and of a tag that one name alone
    has, the name; of a pair held out, its caption.
    """
    rng = np.random.default_rng(seed)
    seen = {facts["name"] for facts in emoji if facts["aurora_held_out"] != "name"}
    tags = {(tag, facts["name"]) for facts in emoji for tag in facts["tags"] if facts["name"] in seen}
    shared = Counter(tag for tag, _ in tags)
    asked = [("names", name, name) for name in rng.permutation(sorted(seen))[:WORDS].tolist()]
    own = sorted(pair for pair in tags if shared[pair[0]] == 1)
    asked += [("tags", *own[i]) for i in rng.permutation(len(own))[:WORDS]]
    held_out = {"name": "{name}", "style": "{name}, {style} style", "tone": "{name}, {tone}"}
    for kind, form in held_out.items():
        prompts = {form.format(**facts) for facts in emoji if facts["aurora_held_out"] == kind}
        asked += [(f"held-out {kind}s", prompt, prompt) for prompt in sorted(prompts)]
    return asked


def r_precision(draw, asked, seed, resolution, reader):
    """{kind: (R-precision, number)} of `questions`. draw: of features.drawing. reader: embeds images and captions."""
    kinds, prompts, answers = zip(*asked, strict=True)
    images = extract_generated(draw, list(prompts), seed, resolution, {"reader": reader})["reader"]
    hits = own_caption_first(images, embed(reader, answers), list(answers)).double()
    of_kind = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)}
    return {kind: (hits[rows].mean().item(), len(rows)) for kind, rows in of_kind.items()}


def small(pixels):
    """uint8 [B, 3, R, R] → [B, 3 · SIDE²], averaged down: the features that variety is measured in."""
    return resize(pixels.float() / 127.5 - 1, SIDE).flatten(1)


def spread(points):
    """The mean distance between two of some images of `small`, [N, D], as the RMS over pixels and channels."""
    return (torch.pdist(points) / points.shape[1] ** 0.5).mean().item()


def variety(draw, emoji, seed, names=200):
    """How much SEEDS pictures of one name differ, as a share of how much real ones differ → the share, and the number
    of names. emoji: of `read_emoji`, a list.
    """
    pictures = defaultdict(list)
    for facts, svg in emoji:
        if not facts["tone"] and not facts["aurora_held_out"]:
            pictures[facts["name"]].append(svg)
    drawn = sorted(name for name, svgs in pictures.items() if len(svgs) >= FEWEST)
    drawn = np.random.default_rng(seed).permutation(drawn)[:names].tolist()
    captions = [name for name in drawn for _ in range(SEEDS)]
    points = extract_generated(draw, captions, seed, 64, {"small": Extractor("", small, None)})["small"]
    generated = sum(map(spread, points.split(SEEDS)))
    real = 0.0
    for name in drawn:
        images = torch.stack([read_image(io.BytesIO(svg), 64) for svg in pictures[name]])
        real += spread(small(to_pixels(images, 64)))
    return generated / real, len(drawn)
