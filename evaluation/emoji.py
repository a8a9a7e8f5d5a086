"""What only the emoji allow us to measure: whether pictures match single words, and how much seeds differ.

data/make_emoji.py explains which pictures are held out.
"""

import io
from collections import Counter, defaultdict

import numpy as np
import torch

from data.pairs import read_image
from evaluation.extractors import Extractor
from evaluation.features import embed, extract_generated, to_pixels
from evaluation.metrics import own_caption_first
from layers import resize

SEEDS = 8  # pictures of each name for the variety
FEWEST = 4  # real pictures that a name needs for the variety
SIDE = 8  # pixels: pictures differ in shapes and colours, not in details
WORDS = 400  # names, and as many tags


def questions(emoji, seed):
    """The facts of all pictures → [(kind, prompt, answer)].

    The picture of a prompt should be nearer to its answer than to other answers. The answer to a name, or to a tag that
    only one name has, is the name; to the caption of a held-out pair, the caption.
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
    """`questions` → {kind: (R-precision, number)}. draw: see features.drawing. reader: an Extractor with texts."""
    kinds, prompts, answers = zip(*asked, strict=True)
    images = extract_generated(draw, list(prompts), seed, resolution, {"reader": reader})["reader"]
    hits = own_caption_first(images, embed(reader, answers), list(answers)).double()
    of_kind = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)}
    return {kind: (hits[rows].mean().item(), len(rows)) for kind, rows in of_kind.items()}


def small(pixels):
    """uint8 [B, 3, R, R] → [B, 3 · SIDE²], averaged down: the features for the variety."""
    return resize(pixels.float() / 127.5 - 1, SIDE).flatten(1)


def spread(points):
    """Features [N, D] of `small` → the mean distance of all pairs, as the RMS over pixels and channels."""
    return (torch.pdist(points) / points.shape[1] ** 0.5).mean().item()


def variety(draw, emoji, seed, names=200):
    """How much SEEDS pictures of one name differ, divided by how much real ones do → the share, the number of names.

    emoji: the samples of data.emoji.read_emoji.
    """
    pictures = defaultdict(list)
    for sample in emoji:
        facts = sample.facts
        if not facts["tone"] and not facts["aurora_held_out"]:
            pictures[facts["name"]].append(sample.image)
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
