"""Picture files. Those we write say how they were made; there may be thousands in a folder."""

import itertools
import json
from pathlib import Path

from PIL import Image, PngImagePlugin
from tqdm import tqdm

from common.cli import MADE_BY, UserError, check_file, first_line
from common.disk import Damaged, atomically, delete_unfinished, digest_of
from data import svg
from data.pairs import FORMATS, Unusable, read_image
from sampling import latent
from sampling.pipeline import Pipeline

MOST = 1000  # pictures in one file
KINDS = ("PNG", "JPEG", "GIF")  # that are written
INDEX = "pictures.jsonl"  # in the folder of write_each: a line for each picture
FRAME_MS = 80  # milliseconds per frame of an animation


def check_picture(path, given=None):
    """Checks that a picture can be written to a path, and replaces only a picture of `save`. Raises UserError, OSError.

    given: the picture that the user gave, which may also be of `save`.
    """
    if Image.registered_extensions().get(path.suffix.lower()) not in KINDS:
        raise UserError(f"--out {path}: unknown picture format {path.suffix!r}; use .png or .jpg")
    if given and given.exists() and path.exists() and path.samefile(given):
        raise UserError(f"--out {path} is the picture that you gave; name another file with --out")
    check_file(path)


def read_picture(path, resolution):
    """The file of a square picture of R pixels or more → [3, R, R] in [−1, 1]. Raises UserError and OSError."""
    if not is_square(path, resolution):
        raise UserError(f"{path} is not square; give a square picture of {resolution}×{resolution}, or a larger one")
    try:
        with open(path, "rb") as file:
            return read_image(file, resolution)
    except Unusable as error:
        fix = f"give another, such as a PNG or JPEG of {resolution} pixels or more"
        raise UserError(f"{path} cannot be used ({error}); {fix}") from error


def is_square(path, resolution):
    """Whether a picture's sides are equal. Also True for a file that cannot be read, as its reader says why."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
    except (OSError, ValueError):
        try:
            width, height = svg.render(path.read_bytes(), resolution).size
        except Exception:  # of any kind, because it is no SVG either
            return True
    return width == height


def save(pictures, path, about):
    """Writes PIL images as one file, atomically, with `about`, {name: value}, in it. Of a PNG, `how_made` reads it."""
    first, *others = pictures
    kind = Image.registered_extensions()[path.suffix.lower()]
    options = {"save_all": True, "append_images": others, "duration": FRAME_MS, "loop": 0} if others else {}
    if kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt(MADE_BY, json.dumps(about, ensure_ascii=False))
    else:
        options["comment"] = f"{MADE_BY}: {json.dumps(about)}".encode()[:60_000]  # a JPEG has room for 65,533 bytes
    try:
        atomically(path.resolve(), lambda temporary: first.save(temporary, kind, **options))  # a link stays a link
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and error.filename:  # of the disk, not of the format
            raise
        size = f"{first.width}×{first.height}"
        raise UserError(
            f"--out {path} cannot be written at {size} ({first_line(error)}); try .png or fewer pictures"
        ) from error


def how_made(path):
    """The `about` of a PNG that `save` wrote, {name: value}. Raises UserError; Damaged if it is no whole picture."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            picture.load()
            about = json.loads(picture.text[MADE_BY])
            about.items()
    except FileNotFoundError:
        raise UserError(f"--show {path}: there is no such file") from None
    except (AttributeError, KeyError):
        raise UserError(f"--show {path} does not say how it was made; give a PNG file of sample.py") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise Damaged(f"--show {path} cannot be read ({first_line(error)})") from error
    return about


def write_each(pipe: Pipeline, prompts, num, seed, psi, folder: Path, checkpoint: str):
    """Writes `num` pictures of each prompt, at their own resolution, into a folder → how many are new.

    The files are 000000.png and so on. Each contains how it was made, as does a line of pictures.jsonl, which is
    written last. A folder that contains some of the pictures is completed: every call draws the same batches, so the
    pictures are identical. Raises UserError if the folder contains pictures of another command or model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    delete_unfinished(folder)
    weights = " ".join(digest_of(stage.state_dict()) for stage in pipe.stages)
    abouts = [
        {"file": f"{i:06d}.png", "prompt": prompt, "number": n, "seed": seed, "psi": psi, "checkpoint": checkpoint}
        | {"weights": weights, "resolution": pipe.resolution}
        for i, (prompt, n) in enumerate(itertools.product(prompts, range(num)))
    ]
    lines = [json.dumps(about, ensure_ascii=False).encode() + b"\n" for about in abouts]
    missing = find_missing(folder, abouts, lines)
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
    atomically(folder / INDEX, lambda temporary: temporary.write_bytes(b"".join(lines)))
    return len(missing)


def find_missing(folder, abouts, lines):
    """The names of the pictures that a folder of write_each still lacks. Raises UserError for pictures of other kinds.

    lines: of the index, one for each of abouts.
    """
    index, missing = folder / INDEX, set()
    listed = set(index.read_bytes().splitlines(keepends=True)) if index.exists() else set()
    names = {about["file"] for about in abouts}
    surplus = [path for path in folder.glob("[0-9]*.png") if path.name not in names]
    if surplus or not listed <= set(lines) or (index.exists() and not listed):
        raise UserError(f"--each {folder} contains pictures of another command or model; name another folder")
    for about, line in zip(abouts, lines, strict=True):
        path = folder / about["file"]
        if not path.exists():
            missing.add(path.name)
            continue
        try:
            same = how_made(path) == about
        except UserError as error:  # not a picture of ours, or no longer
            if isinstance(error, Damaged) and line in listed:
                again = "delete this file, and give the same command again"
                raise UserError(f"--each {folder}: {path.name} is damaged; {again}") from error
            same = False
        if not same:
            raise UserError(f"--each {folder} contains a foreign {path.name}; name another folder")
    return missing
