"""The file of a generator: its moving average, and the metadata that sampling needs."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from clip import MODELS, load_text
from common.cli import UserError, first_line
from common.disk import atomically, load_tensors
from presets import OPENAI_CLIP, GeneratorConfig, UpsamplerConfig
from upsampler import Upsampler, new_generator
from weights.official import load_official

STAGES = {"generator": GeneratorConfig, "upsampler": UpsamplerConfig}  # {name in their files: configuration}
FILE = "generator_ema.safetensors"  # its name in a run's folder
DEMO = MODELS / "emoji.safetensors"


def content(generator, clip, resolution, notes):
    """What is in a generator's file → the tensors of the levels up to `resolution`, and the metadata: configuration,
    names of the text encoder and of CLIP, and notes, a dict about the run.
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
    """Writes the file of a generator, see content. Raises OSError on a full disk."""
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    atomically(path, lambda temporary: temporary.write_bytes(content))


def load_generator(path, device="cpu", clip_spec=None):
    """Reads a file of save_generator, or the authors' aurora_v1.pth → Generator in eval mode, its text encoder, notes.

    path: the file or a run's folder. clip_spec: another source of a large CLIP, see load_clip. For an upsampler, see
    load_upsampler. Raises UserError if the file is missing, damaged or foreign, or its text encoder is not available.
    """
    path = generator_of(path)
    if is_safetensors(path):
        generator, name, notes = load_ours(path)
        if isinstance(generator, Upsampler):
            raise UserError(
                f"{path} is an upsampler, which enlarges pictures; give a generator, and this file as --upsampler"
            )
    else:
        generator, name, notes = load_official_file(path), OPENAI_CLIP, {}
    if clip_spec and clip_spec.partition(":")[0] != name.partition(":")[0]:
        raise UserError(f"{path} reads prompts with {name}, not with {clip_spec}; give no other text encoder")
    text = load_text(clip_spec or name, device)
    text.name = name  # whatever place its weights came from: load_upsampler compares the names
    return generator.to(device).eval().requires_grad_(False), text, notes


def load_upsampler(path, text, device="cpu"):
    """Reads the file of a second stage, or its run's folder → Upsampler in eval mode.

    text: the text encoder of the first stage. Raises UserError like load_generator, and if it needs another encoder.
    """
    path = generator_of(path)
    upsampler, name, _ = load_ours(path)
    if not isinstance(upsampler, Upsampler):
        raise UserError(f"{path} is a generator; give an upsampler")
    if (name, upsampler.config.clip_width) != (text.name, text.width):
        raise UserError(f"{path} reads prompts with {name}, and the generator with {text.name}; give another upsampler")
    return upsampler.to(device).eval().requires_grad_(False)


def upsampler_of(path):
    """The file of the second stage next to a generator's, NAME_upsampler.safetensors; or None."""
    path = generator_of(path)
    beside = path.with_name(f"{path.stem}_upsampler.safetensors")
    return beside if beside.is_file() else None


def generator_of(path):
    """A generator's file, or a run's folder → the file. Raises UserError."""
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no generator at {file}; a run writes its first when it starts")
    return file


def is_safetensors(path):
    """Whether a file with any name is a .safetensors: eight bytes of length, then a header in JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def load_ours(path):
    """→ generator, the name of its text encoder, notes."""
    metadata, state = read_safetensors(path)
    stage = next((stage for stage in STAGES if stage in metadata), None)
    if not stage:
        raise UserError(f"{path} contains no generator of Aurora; give the generator_ema.safetensors of a train.py run")
    try:
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


def load_official_file(path):
    """The authors' generator. Raises UserError."""
    state = load_tensors(path)
    try:
        return load_official(state)
    except ValueError as error:
        raise UserError(f"{path}: {first_line(error)}; give the generator_ema.safetensors of a train.py run") from error


def without_prefix(state, prefix):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
