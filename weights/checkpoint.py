"""Saving: the EMA generator as a file that sampling needs nothing beside, and the whole state of a run."""

import contextlib
import dataclasses
import hashlib
import json
import re
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clip import MODELS, load_text
from common.cli import UserError, first_line
from common.disk import atomically, rename
from presets import OPENAI_CLIP, GeneratorConfig, UpsamplerConfig
from upsampler import Upsampler, new_generator
from weights.official import is_official, load_official

STAGES = {"generator": GeneratorConfig, "upsampler": UpsamplerConfig}  # as their files call them
DEMO = MODELS / "emoji.safetensors"


# ----------------------------------------------------------------------------------------------------------------------
# A generator, ready for sample.py.


def generator_file(generator, clip, resolution, notes):
    """What is in the file of a generator: tensors and metadata, of the levels up to `resolution` and the names of its
    text encoder and of its CLIP.

    notes: a dict of what is worth knowing about the run.
    """
    levels = tuple(level for level in generator.config.levels if level.resolution <= resolution)
    config = dataclasses.replace(generator.config, levels=levels)
    with torch.device("meta"):
        names = new_generator(config).state_dict().keys()
    state = generator.state_dict()
    metadata = {
        "upsampler" if isinstance(config, UpsamplerConfig) else "generator": json.dumps(dataclasses.asdict(config)),
        "text": clip.text.name,
        "clip": clip.name,
        "notes": json.dumps(notes),
    }
    return {f"generator.{name}": state[name] for name in names}, metadata


def save_generator(path, tensors, metadata):
    """Writes the file of a generator, see generator_file. Raises OSError on a full disk."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_generator(path, device="cpu", clip_spec=None):
    """A file of save_generator, or the authors' aurora_v1.pth → (Generator in eval mode, its text encoder, notes).

    path may also be a run's folder. The second stage is load_upsampler's. clip_spec: another way to get a large CLIP,
    see load_clip. Raises UserError for a file that is missing, damaged or foreign, and where its text encoder cannot be
    had.
    """
    path = generator_of(path)
    if is_safetensors(path):
        generator, name, notes = _load_ours(path)
        if isinstance(generator, Upsampler):
            raise UserError(
                f"{path} is an upsampler, which enlarges pictures; give a generator, and this as --upsampler"
            )
    else:
        generator, name, notes = _load_official(path), OPENAI_CLIP, {}
    text = load_text(clip_spec or name, device)
    if text.width != generator.config.clip_width:
        width = generator.config.clip_width
        raise UserError(f"{path} needs a text encoder of width {width}, and {text.name} has {text.width}")
    return generator.to(device).eval().requires_grad_(False), text, notes


def load_upsampler(path, text, device="cpu"):
    """A file of save_generator that holds a second stage, or its run's folder → Upsampler in eval mode.

    text: the text encoder of the first stage. Raises UserError, as load_generator, and where it needs another one.
    """
    path = generator_of(path)
    upsampler, name, _ = _load_ours(path)
    if not isinstance(upsampler, Upsampler):
        raise UserError(f"{path} is no upsampler, but a generator")
    if (name, upsampler.config.clip_width) != (text.name, text.width):
        raise UserError(f"{path} reads prompts by {name}, and the generator by {text.name}")
    return upsampler.to(device).eval().requires_grad_(False)


def upsampler_of(path):
    """The file of the second stage that lies beside a generator's: NAME_upsampler.safetensors; or None."""
    path = generator_of(path)
    beside = path.with_name(f"{path.stem}_upsampler.safetensors")
    return beside if beside.is_file() else None


def generator_of(path):
    """A file to draw from, or a run's folder → the file. Raises UserError."""
    path = Path(path)
    file = path / "generator_ema.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no checkpoint at {file}; a run writes its first as it starts")
    return file


def is_safetensors(path):
    """Whatever the file is called: it begins with the length of its header, which is JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def _load_ours(path):
    """→ generator, the name of its text encoder, notes."""
    metadata, state = read_safetensors(path)
    if not metadata.keys() & STAGES.keys():
        raise UserError(f"{path} holds no generator of Aurora; that of a run is its generator_ema.safetensors")
    if "text" not in metadata:
        raise UserError(f"{path} is of an earlier version, whose text encoder is gone; train it anew")
    try:
        stage = next(stage for stage in STAGES if stage in metadata)
        generator = new_generator(STAGES[stage].from_dict(json.loads(metadata[stage])))
        generator.load_state_dict(without_prefix(state, "generator."))
        return generator, metadata["text"], json.loads(metadata["notes"])
    except (IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a generator of train.py, or it is damaged ({first_line(error)})") from error


def read_safetensors(path):
    """→ the metadata, {name: text}, and the tensors, {name: tensor}. Raises UserError."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged, or no .safetensors ({first_line(error)})") from error


def _load_official(path):
    state = load_tensors(path)
    if isinstance(state, dict) and "progress" in state:
        raise UserError(f"{path} is the state of a run; sample with generator_ema.safetensors of its folder")
    try:
        return load_official(state)
    except ValueError as error:
        raise UserError(f"{path}: {first_line(error)}; nor is it a .safetensors of train.py") from error


def load_tensors(path, mmap=False):
    """What torch.save wrote, if it is tensors and plain values: no code in it can run.

    mmap: leaves the tensors on the disk until they are used. Raises UserError: Damaged, unless the disk or the memory
    is at fault.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, MemoryError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    except Exception as error:  # on foreign bytes the unpickler stumbles in every way there is
        reason = "it is damaged, or no checkpoint, or holds code, which is not run"
        raise Damaged(f"{path} cannot be read: {reason}") from error


def without_prefix(state, prefix):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


# ----------------------------------------------------------------------------------------------------------------------
# A run.

CHECKPOINT = re.compile(r"(\d{8,})-([0-9a-f]{16})\.pt")  # its step, and the digest of its content
UNFINISHED = re.compile(r"\d{8,}\.tmp")


class Damaged(UserError):
    """A file does not hold what was written to it."""


class Digested:
    """A binary file that takes the digest of what passes through it, so that nothing is read again for that.

    PyTorch turns an error of the disk into one of its own, so the first is kept.
    """

    def __init__(self, file):
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error = None

    def write(self, data):
        try:
            written = self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.sha256.update(data)
        return written

    def flush(self):
        self.file.flush()


def save_run(folder, step, state, keep):
    """Writes the whole state of a run, a nested dict of tensors and plain values → its path, STEP-DIGEST.pt.

    The digest of the file's content is in its name, as in the names of PyTorch's own weights, so that a single bit that
    changes is noticed. Of the checkpoints in the folder the newest `keep` are kept. Raises OSError where the disk does
    not take it; the older checkpoints are kept then.
    """
    temporary = folder / f"{step:08d}.tmp"
    try:
        path = folder / f"{step:08d}-{write_digested(state, temporary)}.pt"
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for old in checkpoints(folder)[keep:]:
        with contextlib.suppress(OSError):  # Windows deletes no file that is open
            old.unlink()
    return path


def write_digested(state, path):
    """torch.save, → the digest of the file. Raises OSError."""
    with open(path, "wb") as file:
        digested = Digested(file)
        try:
            torch.save(state, digested)
        except RuntimeError as error:
            raise digested.error or OSError(first_line(error)) from error
    return digested.sha256.hexdigest()[:16]


def digest(path):
    """Sixteen digits that tell a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def checkpoints(folder):
    """The states of a run in a folder, the newest first. Files that carry other names are the user's."""
    found = [path for path in Path(folder).glob("*.pt") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: (int(path.name.partition("-")[0]), path.name), reverse=True)


def newest_run(folder, say):
    """The newest checkpoint in a folder that is whole, → its path and state; (None, None) where there is none at all.

    Damaged ones are renamed, so that they are not counted as checkpoints. Raises UserError where all of them are, and
    where the disk does not let one be read.
    """
    paths = checkpoints(folder)
    for path in paths:
        try:
            return path, load_run(path)
        except Damaged as error:
            aside = path.with_name(f"{path.name}.damaged")
            path.replace(aside)
            say(f"note: {error}; it is now {aside.name}, and an older one is tried")
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {folder} can be read; give another --out")
    return None, None


def load_run(path, verify=True):
    """Reads the state of a run, on the CPU. Its tensors stay on the disk until they are used.

    verify: hold the content against the digest in the name, which reads the whole file; one rank of a run does that for
    all. Raises UserError: Damaged for a file that is damaged or foreign; no code in it can run.
    """
    name = CHECKPOINT.fullmatch(Path(path).name)
    try:
        if verify and name and name[2] != digest(path):
            raise Damaged(f"{path} is damaged")
        mmap = zipfile.is_zipfile(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    state = load_tensors(path, mmap)
    if not isinstance(state, dict) or not state.keys() >= {"identity", "progress"}:
        what = (
            "the authors' generator, which has no discriminator" if is_official(state) else "not a checkpoint of a run"
        )
        raise Damaged(f"{path} cannot be resumed from: it is {what}")
    return state


def load_weights(path):
    """The weights that a new run can start from → {"generator", "ema" and, of a run's checkpoint, "discriminator"}.

    path: a checkpoint of a run, its generator_ema.safetensors, or the authors' aurora_v1.pth; what holds one generator
    gives it twice. The values are state_dicts, on the CPU. Raises UserError.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}")
    if is_safetensors(path):
        generator = _load_ours(path)[0]
    elif "progress" in load_tensors(path, mmap=zipfile.is_zipfile(path)):
        state = load_run(path)
        if missing := [name for name in ("generator", "ema") if name not in state]:
            raise UserError(f"{path} lacks the weights of {missing[0]}")
        return {name: state[name] for name in ("generator", "ema", "discriminator")}
    else:
        generator = _load_official(path)
    return {"generator": generator.state_dict(), "ema": generator.state_dict()}
