"""Pictures on disk: each with what it takes to draw it again, one by one or thousands in a folder."""

import itertools
import json
from pathlib import Path

from PIL import Image, PngImagePlugin
from tqdm import tqdm

from common.cli import UserError, check_file, first_line
from common.disk import atomically
from data.pairs import FORMATS, Unusable, read_image
from sampling import latent
from sampling.pipeline import Pipeline

KEY = "aurora"  # the PNG's text field; it holds JSON
INDEX = "pictures.jsonl"  # of a folder: a line for each picture
FRAME_MS = 80  # of an animation


def check_picture(path):
    """As check_file, of a picture. Raises UserError, OSError."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--out {path}: no picture format is called {path.suffix or 'so'}; use .png or .jpg")
    check_file(path)


def read_picture(path, resolution):
    """A picture's file → its centre square [3, R, R] in [−1, 1]. Raises UserError."""
    try:
        with open(path, "rb") as file:
            return read_image(file, resolution)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Unusable as error:
        raise UserError(f"{path} cannot be used ({error}); give a picture of {resolution} pixels or more") from error


def read_small(path, resolution):
    """The file of a square picture that is to be enlarged → [3, R, R] in [−1, 1], a larger one reduced to R.

    Raises UserError.
    """
    try:
        with Image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
    except (OSError, ValueError):
        return read_picture(path, resolution)  # says what it is, or draws an SVG
    if width != height:
        raise UserError(
            f"{path} is {width}×{height}; give a square picture of {resolution}×{resolution}, or a larger one"
        )
    return read_picture(path, resolution)


def save(pictures, path, about):
    """Writes PIL images as one file, whole or not at all. A PNG also holds `about`, {name: value}, for `show`."""
    first, *others = pictures
    kind = Image.registered_extensions()[path.suffix.lower()]
    options = {"save_all": True, "append_images": others, "duration": FRAME_MS, "loop": 0} if others else {}
    if kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt(KEY, json.dumps(about, ensure_ascii=False))
    try:
        atomically(path, lambda temporary: first.save(temporary, kind, **options))
    except (OSError, ValueError, KeyError) as error:
        size = f"{first.width}×{first.height}"
        raise UserError(f"--out {path} cannot be written at {size} ({first_line(error)}); try .png or less") from error


def show(path):
    """How a picture that this program wrote was made, {name: value}. Raises UserError."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            picture.load()
            about = json.loads(picture.text[KEY])
            about.items()
    except FileNotFoundError:
        raise UserError(f"--show {path}: there is no such file") from None
    except (AttributeError, KeyError):
        raise UserError(f"--show {path} does not say how it was made; only PNG files of sample.py do") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"--show {path} cannot be read ({first_line(error)})") from error
    return about


def write_each(pipe: Pipeline, prompts, num, seed, psi, folder: Path, checkpoint: str):
    """Writes `num` pictures of each prompt, at their own resolution, into a folder → how many are new.

    They are 000000.png and so on, each with its prompt, seed and psi in it, and in the end in a line of pictures.jsonl.
    A folder that holds some of them is completed. They are drawn in batches, so thousands take no more memory than a
    few, and the same ones in any attempt. Raises UserError where the folder holds pictures of another command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    abouts = [
        {"file": f"{i:06d}.png", "prompt": prompt, "number": n, "seed": seed, "psi": psi, "checkpoint": checkpoint}
        | {"resolution": pipe.resolution}
        for i, (prompt, n) in enumerate(itertools.product(prompts, range(num)))
    ]
    lines = [json.dumps(about, ensure_ascii=False).encode() + b"\n" for about in abouts]
    index, missing = folder / INDEX, set()
    if index.exists() and not set(index.read_bytes().splitlines(keepends=True)) <= set(lines):
        raise UserError(f"--each {folder} holds pictures of another command; name another folder")
    for about in abouts:
        path = folder / about["file"]
        if not path.exists():
            missing.add(path.name)
            continue
        try:
            same = show(path) == about
        except UserError:  # it does not say
            same = False
        if not same:
            raise UserError(f"--each {folder} holds {path.name}, which is not of this command; name another folder")
    for first in tqdm(range(0, len(abouts), latent.BATCH), unit="batch"):
        batch = abouts[first : first + latent.BATCH]
        if not any(about["file"] in missing for about in batch):
            continue
        frames = []
        for prompt, members in itertools.groupby(batch, key=lambda about: about["prompt"]):
            frames += pipe.frames(prompt, num, seed, psi, [about["number"] for about in members])
        for about, picture in zip(batch, pipe.draw(frames).pictures, strict=True):
            if about["file"] in missing:
                save([picture], folder / about["file"], about)
    atomically(index, lambda temporary: temporary.write_bytes(b"".join(lines)))
    return len(missing)
