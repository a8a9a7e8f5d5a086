"""How models/clip.safetensors was made: the small CLIP of the built-in scenes, by a curriculum of its own.

    python -m experiments.scenes_clip

For any other pictures there is training/small_clip.py, which needs no twins and no curriculum.
"""

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from clip import BUILT_IN, FrozenClip, new_small, save_small
from common.cli import HelpFormatter, check_file, natural_number, told_in_one_line
from data.scenes import OF_ANY, OF_TWO, all_words, make_scene, make_twin, named_all_ways, render, scene_or_twin
from training.small_clip import RESOLUTIONS, UNKNOWN, learn, vocabulary


@dataclass(frozen=True)
class Course:
    """A part of the small CLIP's training, and a cycle of its learning rate."""

    steps: int
    lr: float
    order: tuple[int, int]  # from which step to which it is about who stands where, and about nothing else
    named: tuple[str, ...]  # what scenes of two objects differ in then
    of_two: tuple[str, ...]  # what their twins may differ in before and after
    misled: tuple[float, float]  # how far images are misled after that, at first and at last, see mislead()


COURSES = (
    Course(3200, 2e-3, (1408, 1984), ("relation",), ("relation",) * 36 + ("number",) * 6, (0, 0.15)),
    Course(560, 2e-3, (0, 160), ("relation", "axis"), OF_TWO, (0.15, 0.15)),
)


def train_small(device="cpu", courses=COURSES, batch=128, seed=0):
    """Trains the small CLIP on the built-in scenes with open_clip's own loss; the same seed gives the same weights.

    Every scene comes with its twin, whose caption differs in one thing, so that each word must be read and looked for:
    among random captions the colors alone would nearly do. Most images are smaller than it takes, since the
    networks ask about every resolution, and a few words are made unknown, so that the row of the unknown word means
    "some word". Which of two objects stands on the left is learned from batches of nothing else, all words known, or
    not at all. Then images are misled, more and more: from a CLIP not trained so, a generator learns to mislead it.
    The second course adds that left is not below; in one course with the rest, neither came to be known as well.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = new_small(vocabulary([all_words()])).to(device)
        clip.model.requires_grad_(True).train()
        first = 0
        progress = tqdm(total=sum(course.steps for course in courses), desc="training the small CLIP", unit="step")
        for course in courses:
            take(course, clip, first, batch, 3 * seed + 2, progress)
            first += course.steps * batch
    return FrozenClip(clip.model, "small", clip.kept_ids)


def take(course, clip, first, batch, seed, progress):
    """One course, its scenes those of the collection `seed` from the number `first` on."""
    optimizer = torch.optim.AdamW(clip.model.parameters(), lr=course.lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, course.lr, total_steps=course.steps, pct_start=0.1)
    named = named_all_ways(seed, course.named)
    order_starts, order_ends = course.order
    for step in range(course.steps):
        about_order = order_starts <= step < order_ends
        if about_order:
            scenes = list(itertools.islice(named, batch))
        else:
            start = first + step * batch
            scenes = [scene_or_twin(i, seed, course.of_two) for i in range(start, start + batch)]
        share = batch // len(RESOLUTIONS)
        images = [render(scenes[n * share : (n + 1) * share], r) for n, r in enumerate(RESOLUTIONS)]
        images = [part.to(clip.device) for part in images]
        reach, unknown = None, 0 if about_order else UNKNOWN
        if step >= order_ends:
            least, most = course.misled
            reach = least + (most - least) * (step - order_ends) / (course.steps - order_ends)
        loss = learn(clip, optimizer, schedule, images, [scene.caption for scene in scenes], unknown, reach)
        progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
        progress.update()


@torch.no_grad()
def twin_accuracy(clip, difference, resolution, count=500, seed=10**6):
    """How often a picture [resolution²] is nearer to its own caption than to that of its twin; 1/2 is chance."""
    rng = np.random.default_rng(seed)
    scenes = [make_scene(i, seed) for i in range(count)]
    pairs = [(a, make_twin(a, difference, rng)) for a in scenes if a.relation or difference in OF_ANY]
    scenes, twins = zip(*[(a, b) for a, b in pairs if a.caption != b.caption], strict=True)
    images = F.normalize(clip.encode_image(render(scenes, resolution)), dim=-1)
    own, other = (clip.read([s.caption for s in side]).embedding for side in (scenes, twins))
    return ((images * (own - other)).sum(1) > 0).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description="Trains the small CLIP again.", formatter_class=HelpFormatter)
    parser.add_argument("--seed", type=natural_number, default=0)
    parser.add_argument("--out", type=Path, default=BUILT_IN["small"])
    args = parser.parse_args()
    with told_in_one_line():
        check_file(args.out)
    clip = train_small(seed=args.seed)
    save_small(clip, args.out)
    for difference in dict.fromkeys([*OF_TWO, *OF_ANY]):
        accuracies = [f"{100 * twin_accuracy(clip, difference, r):5.1f} %" for r in sorted(set(RESOLUTIONS))]
        print(f"{difference:12s}", *accuracies)


if __name__ == "__main__":
    main()
