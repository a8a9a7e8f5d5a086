"""Saving: the EMA generator as a file that sampling needs nothing beside, and the whole state of a run."""

import contextlib
import dataclasses
import hashlib
import json
import os
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from aurora import Generator
from clip import load_clip, new_small
from common.cli import UserError, first_line
from presets import OPENAI_CLIP, GeneratorConfig
from weights.official import is_official, load_official

DEMO = Path(__file__).parent.parent / "models" / "shapes.safetensors"


def atomically(path, write):
    """Calls write(temporary path), then renames: whoever reads `path` finds the old file or the new one, whole.

    The file is on the disk before it takes its name, so that this holds where a machine loses power too.
    """
    temporary = Path(f"{path}.tmp")
    try:
        write(temporary)
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def rename(temporary, path):
    """Gives a file its name once it is on the disk."""
    flush(temporary)
    os.replace(temporary, path)
    with contextlib.suppress(PermissionError):  # Windows opens no folder
        flush(path.parent)


def flush(path):
    """Waits until a file, or the list of what a folder holds, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------------------------------
# A generator, ready for sample.py.


def save_generator(path, generator, clip, resolution, notes):
    """Writes the levels of a generator up to `resolution`, and of a small CLIP the text tower; of another, its name.

    notes: a dict of what is worth knowing about the run, kept in the file's metadata. Raises OSError on a full disk.
    """
    levels = tuple(level for level in generator.config.levels if level.resolution <= resolution)
    config = dataclasses.replace(generator.config, levels=levels)
    with torch.device("meta"):
        names = Generator(config).state_dict().keys()
    state = generator.state_dict()
    tensors = {f"generator.{name}": state[name].contiguous() for name in names}
    if clip.kept_ids is not None:
        text_tower = {name: v for name, v in clip.model.state_dict().items() if not name.startswith("visual.")}
        tensors |= {f"clip.{name}": value.contiguous() for name, value in text_tower.items()}
    metadata = {
        "generator": json.dumps(dataclasses.asdict(config)),
        "clip": clip.name,
        "kept_ids": json.dumps(clip.kept_ids),
        "notes": json.dumps(notes),
    }
    try:
        atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    except SafetensorError as error:
        raise OSError(first_line(error)) from error


def load_generator(path, device="cpu", clip_spec=None):
    """A file of save_generator, or the authors' aurora_v1.pth → (Generator in eval mode, its CLIP, notes).

    The CLIP of a file that holds one has no image tower. clip_spec: another way to get a large CLIP, see load_clip.
    Raises UserError for a file that is missing, damaged or foreign, and where its CLIP cannot be had.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}")
    if Path(path).suffix == ".safetensors":
        generator, clip, notes = _load_ours(path)
    else:
        generator, clip, notes = _load_official(path), OPENAI_CLIP, {}
    if isinstance(clip, str):
        clip = load_clip(clip_spec or clip, device)
    if clip.width != generator.config.clip_width:
        raise UserError(f"{path} needs a CLIP of width {generator.config.clip_width}, and {clip.name} has {clip.width}")
    return generator.to(device).eval().requires_grad_(False), clip.to(device), notes


def _load_ours(path):
    """→ generator, its small CLIP or the name of a large one, notes."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        generator = Generator(GeneratorConfig.from_dict(json.loads(metadata["generator"])))
        generator.load_state_dict(without_prefix(state, "generator."))
        clip, kept_ids = metadata["clip"], json.loads(metadata["kept_ids"])
        if kept_ids is not None:
            clip = new_small(kept_ids)
            clip.model.visual = None
            clip.model.load_state_dict(without_prefix(state, "clip."))
        return generator, clip, json.loads(metadata["notes"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a generator of train.py, or it is damaged ({first_line(error)})") from error


def _load_official(path):
    state = load_tensors(path)
    if isinstance(state, dict) and "progress" in state:
        raise UserError(f"{path} is the state of a run; sample with generator_ema.safetensors of its folder")
    try:
        return load_official(state)
    except ValueError as error:
        raise UserError(f"{path}: {first_line(error)}; nor is it a .safetensors of train.py") from error


def load_tensors(path):
    """What torch.save wrote, if it is tensors and plain values: no code in it can run. Raises UserError otherwise."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on foreign bytes the unpickler stumbles in every way there is
        raise UserError(
            f"{path} cannot be read: it is damaged, or no checkpoint, or holds code, which is not run"
        ) from error


def without_prefix(state, prefix):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


# ----------------------------------------------------------------------------------------------------------------------
# A run.


def save_run(folder, step, state, keep):
    """Writes the whole state of a run, a nested dict of tensors and plain values → its path, STEP-DIGEST.pt.

    The digest of the file's content is in its name, as in the names of PyTorch's own weights, so that a single bit that
    changes is noticed. Of the checkpoints in the folder the newest `keep` are kept. Raises OSError where the disk does
    not take it; what was there before is kept then.
    """
    temporary = folder / f"{step:08d}.tmp"
    try:
        torch.save(state, temporary)
        path = folder / f"{step:08d}-{digest(temporary)}.pt"
        rename(temporary, path)
    except RuntimeError as error:  # torch.save's word for a full disk
        raise OSError(first_line(error)) from error
    finally:
        temporary.unlink(missing_ok=True)
    for old in checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def digest(path):
    """Sixteen digits that tell a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def checkpoints(folder):
    """The states of a run in a folder, the newest first."""
    return sorted(Path(folder).glob("*-*.pt"), reverse=True)


def newest_run(folder, say):
    """The newest checkpoint in a folder that is whole, → its path and state; (None, None) where there is none at all.

    Damaged ones are renamed, so that they are not counted as checkpoints. Raises UserError where all of them are.
    """
    paths = checkpoints(folder)
    for path in paths:
        try:
            return path, load_run(path)
        except UserError as error:
            aside = path.with_name(f"{path.name}.damaged")
            path.rename(aside)
            say(f"note: {error}; it is now {aside.name}, and an older one is tried")
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {folder} can be read; give another --out")
    return None, None


def load_run(path):
    """Reads it again, on the CPU. Raises UserError where the file is damaged or foreign; no code in it can run."""
    name = Path(path).stem
    try:
        if "-" in name and name.rpartition("-")[2] != digest(path):
            raise UserError(f"{path} is damaged")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    state = load_tensors(path)
    if not isinstance(state, dict) or not state.keys() >= {"identity", "progress", "discriminator"}:
        what = (
            "the authors' generator, which has no discriminator" if is_official(state) else "not a checkpoint of a run"
        )
        raise UserError(f"{path} cannot be resumed from: it is {what}")
    return state
