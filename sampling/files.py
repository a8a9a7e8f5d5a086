"""Picture files. Those we write say how they were made; there may be thousands in a folder."""

import itertools
import json
from pathlib import Path

from PIL import Image, PngImagePlugin
from tqdm import tqdm

from common.cli import MADE_BY, UserError, check_file
from common.disk import atomically, delete_unfinished, digest_of
from data.pairs import Unusable, read_image
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
        raise UserError(f"--out {path}: unknown picture format {path.suffix!r}; use .png, .jpg or .gif")
    if given and given.exists() and path.exists() and path.samefile(given):
        raise UserError(f"--out {path} is the picture that you gave; name another file with --out")
    check_file(path)


def read_picture(path, resolution):
    """The file of a picture of R pixels or more → its centre square [3, R, R] in [−1, 1]. Raises UserError, OSError."""
    try:
        with open(path, "rb") as file:
            return read_image(file, resolution)
    except Unusable as error:
        fix = f"give another, such as a PNG or JPEG of {resolution} pixels or more"
        raise UserError(f"{path} cannot be used ({error}); {fix}") from error


def save(pictures, path, about):
    """Writes PIL images as one file, atomically, with `about`, {name: value}, in it; in a PNG, as the text MADE_BY."""
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
    except (OSError, OverflowError) as error:  # the latter for a GIF that is too wide
        if getattr(error, "filename", None):  # of the disk, not of the format
            raise
        size = f"{first.width}×{first.height}"
        raise UserError(f"--out {path} cannot be written at {size}; try .png or fewer pictures") from error


def write_each(pipe: Pipeline, prompts, num, seed, psi, folder: Path, checkpoint: str):
    """Writes `num` pictures of each prompt, at their own resolution, into a folder → how many are new.

    The files are 000000.png and so on. A line of pictures.jsonl, which is written first, says how each is made. In a
    folder that has this index, only the missing pictures are written: a file that exists is whole, and every call draws
    the same batches, so the pictures are identical. Raises UserError for a folder with pictures of another index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    delete_unfinished(folder)
    weights = " ".join(digest_of(stage.state_dict()) for stage in pipe.stages)
    same = {"seed": seed, "psi": psi, "checkpoint": checkpoint, "weights": weights, "resolution": pipe.resolution}
    abouts = [
        {"file": f"{i:06d}.png", "prompt": prompt, "number": n, **same}
        for i, (prompt, n) in enumerate(itertools.product(prompts, range(num)))
    ]
    index, content = folder / INDEX, "".join(json.dumps(about, ensure_ascii=False) + "\n" for about in abouts).encode()
    is_foreign = index.read_bytes() != content if index.exists() else any(folder.glob("[0-9]*.png"))
    if is_foreign:
        raise UserError(f"--each {folder} contains pictures of another command or model; name another folder")
    atomically(index, lambda temporary: temporary.write_bytes(content))
    missing = {about["file"] for about in abouts if not (folder / about["file"]).exists()}
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
    return len(missing)
