"""Captioned scenes drawn on the fly: one or two coloured shapes on a plain background, each a function of its index.

They need no download, have an exact right answer for every caption, and leave out some shape–colour pairs, so that what
a model draws for those was never seen.
"""

from dataclasses import dataclass, replace

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
RADII = {"small": (0.12, 0.14), "large": (0.21, 0.24)}  # as a share of the image's width
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


DIFFERENCES = ["relation"] * 6 + ["shape"] * 8 + ["size"] * 3 + ["color"] * 2 + ["background"]  # of twins


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


def scene(index, seed=0, pairs=SEEN):
    """The scene number `index` of the endless collection `seed`, its objects' (shape, color) taken from `pairs`."""
    rng = np.random.default_rng([seed, index])
    background = str(rng.choice(list(BACKGROUNDS)))
    relation = str(rng.choice(list(RELATIONS))) if rng.random() < 0.5 else None
    chosen = [pairs[i] for i in rng.integers(len(pairs), size=2 if relation else 1)]
    sizes = [str(size) for size in rng.choice(list(RADII), size=len(chosen))]
    radii = [rng.uniform(*RADII[size]) for size in sizes]
    centres = _place(rng, radii, relation)
    objects = tuple(
        Object(shape, color, size, float(x), float(y), radius)
        for (shape, color), size, (x, y), radius in zip(chosen, sizes, centres, radii, strict=True)
    )
    template = str(rng.choice(TEMPLATES, p=TEMPLATE_SHARES))
    named = f"{{0}} {rng.choice(RELATIONS[relation][0])} a {{1}}" if relation else "{0}"
    return Scene(objects, background, relation, template.replace("{objects}", named))


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


def twin(original, difference, rng):
    """A scene whose caption differs in one thing, its objects placed anew.

    difference: "shape", "color" or "size" of one object, the "background", or the "relation" of two, which are named
    the other way round. As `scene` does, it leaves out what is HELD_OUT.
    """
    objects, background = list(original.objects), original.background
    i = rng.integers(len(objects))
    old = objects[i]
    if difference == "background":
        background = str(rng.choice([b for b in BACKGROUNDS if b != background]))
    elif difference == "relation":
        objects.reverse()
    elif difference == "size":
        size = "large" if old.size == "small" else "small"
        objects[i] = replace(old, size=size, radius=rng.uniform(*RADII[size]))
    elif difference == "shape":
        objects[i] = replace(old, shape=str(rng.choice([s for s, c in SEEN if c == old.color and s != old.shape])))
    else:
        objects[i] = replace(old, color=str(rng.choice([c for s, c in SEEN if s == old.shape and c != old.color])))
    centres = _place(rng, [o.radius for o in objects], original.relation)
    placed = tuple(replace(o, x=float(x), y=float(y)) for o, (x, y) in zip(objects, centres, strict=True))
    return replace(original, objects=placed, background=background)


def scene_or_twin(index, seed=0):
    """Number `index` of the collection in which every scene is followed by a twin, mostly by the hardest to tell."""
    original = scene(index // 2, seed)
    if index % 2 == 0:
        return original
    rng = np.random.default_rng([seed, index // 2, 1])
    return twin(original, rng.choice([d for d in DIFFERENCES if original.relation or d != "relation"]), rng)


def draw(scenes, resolution):
    """Renders scenes as float32 [B, 3, R, R] in [−1, 1]. A pixel's colours are mixed by the area they cover."""
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


def vocabulary():
    """Every word that a caption can hold."""
    phrases = [phrase for phrasings, *_ in RELATIONS.values() for phrase in phrasings]
    phrases += [template.format(objects="", background="") for template in TEMPLATES]
    return sorted(
        {word for text in [*phrases, *COLORS, *BACKGROUNDS, *RADII, *SHAPES] for word in text.split()} | {","}
    )
