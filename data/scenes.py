"""Captioned scenes drawn on the fly: one or two colored shapes on a plain background, each a function of its index.

They need no download, have an exact right answer for every caption, and leave out some shape–color pairs, so that what
a model draws for those was never seen.
"""

import itertools
import re
from dataclasses import dataclass

import numpy as np
import torch

COLORS = {
    "red": (0.86, 0.08, 0.12),
    "orange": (1.0, 0.55, 0.0),
    "yellow": (1.0, 0.92, 0.1),
    "green": (0.1, 0.6, 0.15),
    "cyan": (0.1, 0.85, 0.9),
    "blue": (0.1, 0.2, 0.9),
    "purple": (0.5, 0.1, 0.65),
    "pink": (1.0, 0.5, 0.75),
}
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "gray": (0.5, 0.5, 0.5), "black": (0.0, 0.0, 0.0), "tan": (0.8, 0.68, 0.5)}
SIZES = ("small", "large")
RADII = {  # as shares of the image's width, by how many objects there are: one alone is drawn larger
    1: {"small": (0.17, 0.2), "large": (0.29, 0.34)},
    2: {"small": (0.13, 0.15), "large": (0.21, 0.24)},
}
TWO_OBJECTS = 1 / 3  # of the scenes; the others have one
RELATIONS = {  # phrasings, and on which axis (0: x, 1: y, downward) the first object comes before (+1) or after (−1)
    "left of": (("left of", "to the left of"), 0, +1),
    "right of": (("right of", "to the right of"), 0, -1),
    "above": (("above", "over"), 1, +1),
    "below": (("below", "under"), 1, -1),
}
TEMPLATES = (  # the last leaves the background to chance
    "a {objects} on a {background} background",
    "on a {background} background, a {objects}",
    "a picture of a {objects} on a {background} background",
    "a {objects}",
)
TEMPLATE_SHARES = (0.5, 0.2, 0.2, 0.1)


def _circle(x, y, r):
    return np.hypot(x, y) - r


def _ring(x, y, r):
    return np.abs(np.hypot(x, y) - 0.74 * r) - 0.26 * r


def _square(x, y, r):
    return np.maximum(np.abs(x), np.abs(y)) - 0.85 * r


def _triangle(x, y, r):
    y = y - 0.2 * r
    return np.maximum(y, np.abs(x) * (np.sqrt(3) / 2) - y / 2) - 0.6 * r


def _cross(x, y, r):
    x, y, arm = np.abs(x), np.abs(y), 0.34 * r
    return np.minimum(np.maximum(x - r, y - arm), np.maximum(x - arm, y - r))


def _star(x, y, r):
    """Five points: by symmetry, the distance to one edge, from the outer vertex at angle 0 to the inner one at π/5."""
    angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius, outer, inner = np.hypot(x, y), 1.15 * r, 0.5 * r
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    ex, ey = inner * np.cos(np.pi / 5) - outer, inner * np.sin(np.pi / 5)
    return (ey * (px - outer) - ex * py) / np.hypot(ex, ey)


SHAPES = {  # signed distances to the outline, negative inside; y points down
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
HELD_OUT = {  # never drawn in training, nor named in its captions
    ("circle", "purple"),
    ("square", "yellow"),
    ("triangle", "cyan"),
    ("star", "red"),
    ("ring", "green"),
    ("cross", "pink"),
}
SEEN = [(shape, color) for shape in SHAPES for color in COLORS if (shape, color) not in HELD_OUT]


# What twins of two objects may differ in, as often as it takes to learn.
OF_TWO = ("relation",) * 36 + ("axis",) * 6 + ("number",) * 6
OF_ANY = ("shape",) * 8 + ("size",) * 3 + ("color",) * 2 + ("background",)  # and those of one or two


@dataclass(frozen=True)
class Object:
    """A shape, its centre (x, y) and radius as shares of the image's width."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float

    def __str__(self):
        return f"{self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    background: str
    relation: str | None  # of the first object to the second
    wording: str  # the caption, with {0}, {1} and {background} in place of what they name

    @property
    def caption(self):
        return self.wording.format(*self.objects, background=self.background)


def make_scene(index, seed=0, pairs=SEEN):
    """The scene number `index` of the endless collection `seed`, its objects' (shape, color) taken from `pairs`."""
    rng = np.random.default_rng([seed, index])
    background = str(rng.choice(list(BACKGROUNDS)))
    relation = str(rng.choice(list(RELATIONS))) if rng.random() < TWO_OBJECTS else None
    chosen = [pairs[i] for i in rng.integers(len(pairs), size=2 if relation else 1)]
    objects = _objects(rng, [(*pair, str(rng.choice(SIZES))) for pair in chosen], relation)
    template = str(rng.choice(TEMPLATES, p=TEMPLATE_SHARES))
    named = f"{{0}} {rng.choice(RELATIONS[relation][0])} a {{1}}" if relation else "{0}"
    return Scene(objects, background, relation, template.replace("{objects}", named))


def _objects(rng, looks, relation):
    """Objects of these (shape, color, size), placed as the relation asks."""
    radii = [rng.uniform(*RADII[len(looks)][size]) for *_, size in looks]
    centres = _place(rng, radii, relation)
    return tuple(
        Object(*look, float(x), float(y), radius) for look, (x, y), radius in zip(looks, centres, radii, strict=True)
    )


def _place(rng, radii, relation):
    """Centres inside the image; two are apart along the relation's axis and less so along the other."""
    if not relation:
        return [rng.uniform(radii[0], 1 - radii[0], size=2)]
    _, axis, sign = RELATIONS[relation]
    first, second = radii[::sign]  # in the order of growing coordinates
    distance = first + second
    a = rng.uniform(first, 1 - second - distance)
    b = rng.uniform(a + distance, 1 - second)
    across_a = rng.uniform(first, 1 - first)
    across_b = rng.uniform(max(second, across_a - 0.8 * distance), min(1 - second, across_a + 0.8 * distance))
    centres = [(a, across_a), (b, across_b)][::sign]
    return [centre[:: 1 if axis == 0 else -1] for centre in centres]


def make_twin(original, difference, rng):
    """A scene whose caption differs in one thing, its objects drawn anew.

    difference: "shape", "color" or "size" of one object, the "background"; of two objects also their "relation", when
    they are named the other way round, their "axis", when left or right becomes above or below, or the "number", when
    one is gone. Like make_scene it leaves out what is HELD_OUT.
    """
    looks = [(o.shape, o.color, o.size) for o in original.objects]
    background, relation, wording = original.background, original.relation, original.wording
    i = rng.integers(len(looks))
    shape, color, size = looks[i]
    if difference == "background":
        background = str(rng.choice([b for b in BACKGROUNDS if b != background]))
    elif difference == "relation":
        looks.reverse()
    elif difference == "axis":
        _, axis, _ = RELATIONS[relation]
        relation = str(rng.choice([other for other in RELATIONS if RELATIONS[other][1] != axis]))
        wording = re.sub(r"\{0\} .* \{1\}", f"{{0}} {rng.choice(RELATIONS[relation][0])} a {{1}}", wording)
    elif difference == "number":
        looks, relation, wording = [looks[i]], None, re.sub(r"\{0\} .* \{1\}", "{0}", wording)
    elif difference == "size":
        looks[i] = shape, color, "large" if size == "small" else "small"
    elif difference == "shape":
        looks[i] = str(rng.choice([s for s, c in SEEN if c == color and s != shape])), color, size
    else:
        looks[i] = shape, str(rng.choice([c for s, c in SEEN if s == shape and c != color])), size
    return Scene(_objects(rng, looks, relation), background, relation, wording)


def scene_or_twin(index, seed=0, of_two=OF_TWO):
    """Number `index` of the collection in which every scene is followed by a twin, mostly by the hardest to tell."""
    original = make_scene(index // 2, seed)
    if index % 2 == 0:
        return original
    rng = np.random.default_rng([seed, index // 2, 1])
    return make_twin(original, rng.choice(of_two + OF_ANY if original.relation else OF_ANY), rng)


def named_all_ways(seed=0, differences=("relation", "axis")):
    """Endless scenes of two objects, each followed by its twin in each difference and in every pair of these."""
    for index in itertools.count():
        original = make_scene(index, seed)
        if original.relation:
            rng = np.random.default_rng([seed, index, 2])
            group = [original]
            for difference in differences:
                group += [make_twin(member, difference, rng) for member in group]
            yield from group


def render(scenes, resolution):
    """Renders scenes as float32 [B, 3, R, R] in [−1, 1]. A pixel's colors are mixed by the area they cover."""
    fine = resolution * max(1, -(-64 // resolution))  # coarse images are averaged from at least 64×64
    centres = (np.arange(fine, dtype=np.float32) + 0.5) / fine
    x, y = centres[None, :], centres[:, None]
    images = np.empty((len(scenes), 3, fine, fine), dtype=np.float32)
    for image, scene in zip(images, scenes, strict=True):
        image[:] = np.array(BACKGROUNDS[scene.background], dtype=np.float32)[:, None, None]
        for o in scene.objects:
            covered = np.clip(0.5 - SHAPES[o.shape](x - o.x, y - o.y, o.radius) * fine, 0, 1)
            image += covered * (np.array(COLORS[o.color], dtype=np.float32)[:, None, None] - image)
    pixels = images.reshape(len(scenes), 3, resolution, fine // resolution, resolution, fine // resolution)
    return torch.from_numpy(pixels.mean((3, 5)) * 2 - 1)


def all_words():
    """Every word that a caption can hold."""
    phrases = [phrase for phrasings, *_ in RELATIONS.values() for phrase in phrasings]
    phrases += [template.format(objects="", background="") for template in TEMPLATES]
    return sorted(
        {word for text in [*phrases, *COLORS, *BACKGROUNDS, *SIZES, *SHAPES] for word in text.split()} | {","}
    )
