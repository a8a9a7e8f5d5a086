"""Checkpoints, the state of a run: a folder STEP-DIGEST with state.pt and the generator's file, its moving average.

A checkpoint is written once and never changed. The digest in its name is of state.pt, which contains the digest of the
generator's file: so every changed bit is noticed. state.pt contains the networks without the moving average, the
optimizers, the phase of growth, the recipe, the progress (step, skipped pairs, seconds), the name of the CLIP, whether
pairs are held out, and what identifies the run.
"""

import contextlib
import re
import shutil
from pathlib import Path

from common import distributed
from common.cli import UserError
from common.disk import Damaged, atomically, digest, load_tensors, rename, write_tensors
from common.distributed import say
from weights.generator_file import FILE, load_ours, read_safetensors, save_generator, without_prefix

STATE = "state.pt"
NAME = re.compile(r"(\d{8,})-([0-9a-f]{16})")  # its step, and the digest of its state
UNFINISHED = ".unfinished"  # the folder of a checkpoint that is being written or deleted; the next one takes its place


def save(folder, step, state, generator, keep):
    """Writes a checkpoint → its path. Deletes all in the folder except the newest `keep`.

    state: nested tensors and plain values. generator: tensors and metadata, see generator_file.content. Raises OSError
    if it cannot be written; then no other is deleted.
    """
    unfinished = folder / UNFINISHED
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # a killed run's
        unfinished.mkdir(exist_ok=True)
        save_generator(unfinished / FILE, *generator)
        state = {**state, "generator_file": digest(unfinished / FILE)}
        atomically(unfinished / STATE, lambda temporary: write_tensors(state, temporary))
        path = folder / f"{step:08d}-{digest(unfinished / STATE)}"
        rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for old in checkpoints(folder)[keep:]:
        with contextlib.suppress(OSError):  # the new one is whole; the next save tries again
            shutil.rmtree(old.rename(unfinished))
    return path


def checkpoints(folder):
    """The checkpoints in a folder, the newest first. Everything with another name is the user's."""
    found = [path for path in Path(folder).glob("*-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (int(path.name.partition("-")[0]), path.name), reverse=True)


def newest(folder):
    """The newest undamaged checkpoint in a folder → its path and state; (None, None) in a folder without checkpoints.

    Damaged ones are renamed, so that they do not count. Raises UserError if all are damaged, or if the disk fails.
    """
    paths = checkpoints(folder)
    for path in paths:
        try:
            return path, load(path)
        except Damaged as error:
            aside = path.with_name(f"{path.name}.damaged")
            path.replace(aside)
            say(f"note: {error}; it is now {aside.name}, and an older one is tried")
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {folder} can be read; give another --out")
    return None, None


def load(path, verify=True):
    """Reads a checkpoint → its state on the CPU, in which "generator_file" is the tensors of that file. Other tensors
    stay on the disk until they are used. No code in the files can run.

    verify: compare the content with the digests, which reads all of it; one rank does that for all. The folder may be a
    copy with any name. Raises Damaged if it is damaged or no checkpoint, and another UserError if the disk fails.
    """
    path = Path(path)
    name = NAME.fullmatch(path.name)
    if not name and not (path / STATE).exists():
        raise UserError(f"{path} is no checkpoint; a run's checkpoints are the folders in its checkpoints/")
    try:
        if verify and name and name[2] != digest(path / STATE):
            raise Damaged(f"{path} is damaged")
        state = load_tensors(path / STATE, mmap=True)
        if not isinstance(state, dict) or not state.keys() >= {"identity", "progress", "generator_file"}:
            raise Damaged(f"{path} is not a checkpoint of a run")
        if verify and state["generator_file"] != digest(path / FILE):
            raise Damaged(f"{path} is damaged")
    except FileNotFoundError as error:
        raise Damaged(f"{path} lacks {Path(error.filename).name}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return {**state, "generator_file": read_safetensors(path / FILE)[1]}


def moving_average(state):
    """The moving average in a checkpoint of train.py. The generator's file lacks the levels that have not learned yet:
    they are equal to the generator's.
    """
    return {**state["generator"], **without_prefix(state["generator_file"], "generator.")}


def load_weights(path):
    """Reads the weights that a new run starts from → {"generator", "ema" and, if there is one, "discriminator"}, as
    state_dicts on the CPU.

    path: a checkpoint, or a generator's file. Next to the file NAME.safetensors, the discriminator may be in
    NAME_discriminator.safetensors. Of a single generator, "generator" and "ema" are the same. Raises UserError.
    """
    path = Path(path)
    if path.is_dir():
        state = load(path, verify=distributed.is_main())
        if missing := [name for name in ("generator", "discriminator") if name not in state]:
            raise UserError(f"{path} lacks the weights of the {missing[0]}")
        return {name: state[name] for name in ("generator", "discriminator")} | {"ema": moving_average(state)}
    if not path.is_file():
        raise UserError(f"no checkpoint and no generator at {path}")
    generator = load_ours(path)[0]
    weights = {"generator": generator.state_dict(), "ema": generator.state_dict()}
    discriminator = path.with_name(f"{path.stem}_discriminator.safetensors")
    if discriminator.is_file():
        weights["discriminator"] = read_safetensors(discriminator)[1]
    return weights
