"""Saving and loading: atomic, held against a digest, and never at the cost of another file."""

import builtins
import hashlib
from dataclasses import replace

import pytest
import torch

from aurora import Generator
from clip import load_clip
from common.cli import UserError
from weights import checkpoint

STATE = {
    "identity": {"seed": 5},
    "progress": {"step": 3},
    "generator": {"weight": torch.randn(5)},
    "ema": {"weight": torch.randn(5)},
    "discriminator": {"weight": torch.randn(300, 400)},
}


def test_a_checkpoint_is_hashed_as_it_is_written(tmp_path, monkeypatch):
    """Reading 24 GB again would keep every GPU waiting."""
    opened = []
    real_open = builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda *args, **options: opened.append(args[1:]) or real_open(*args, **options)
    )
    path = checkpoint.save_run(tmp_path, 3, STATE, keep=3)
    assert ("rb",) not in opened
    assert path.name == f"00000003-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.pt"


@pytest.mark.parametrize("room", [0, 100, 1000, 100_000, 480_000])
def test_a_full_disk_is_an_oserror_that_names_it(tmp_path, monkeypatch, room):
    first = checkpoint.save_run(tmp_path, 1, STATE, keep=1)
    real_open = builtins.open

    class Full:
        def __init__(self, file):
            self.file, self.left = file, room

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", lambda *args, **options: Full(real_open(*args, **options)))
        with pytest.raises(OSError, match="No space left on device"):
            checkpoint.save_run(tmp_path, 2, STATE, keep=1)
    assert list(tmp_path.iterdir()) == [first]
    assert torch.equal(checkpoint.load_run(first)["discriminator"]["weight"], STATE["discriminator"]["weight"])


def test_only_one_rank_reads_the_whole_file(tmp_path, monkeypatch):
    path = checkpoint.save_run(tmp_path, 3, STATE, keep=3)
    calls = []
    monkeypatch.setattr(checkpoint, "digest", lambda path: calls.append(path) or "0" * 16)
    state = checkpoint.load_run(path, verify=False)
    assert not calls and torch.equal(state["discriminator"]["weight"], STATE["discriminator"]["weight"])
    with pytest.raises(checkpoint.Damaged):
        checkpoint.load_run(path)


def test_a_state_stays_readable_after_its_file_is_gone(tmp_path):
    """It is mapped into memory, and the run that reads it prunes it later."""
    path = checkpoint.save_run(tmp_path, 3, STATE, keep=3)
    state = checkpoint.load_run(path)
    before = path.read_bytes()
    state["ema"]["weight"].add_(1)
    assert path.read_bytes() == before  # what is learned is not written back
    path.unlink()
    assert torch.equal(state["discriminator"]["weight"], STATE["discriminator"]["weight"])


def test_checkpoints_are_ordered_by_step_and_copies_are_none(tmp_path):
    for name in ("00000009-0123456789abcdef.pt", "100000000-0123456789abcdef.pt", "00000010-0123456789abcdef.pt"):
        (tmp_path / name).touch()
    for name in ("best-a.pt", "00000011-copy.pt", "00000012-0123456789ABCDEF.pt", "00000013-0123456789abcdef (1).pt"):
        (tmp_path / name).touch()
    steps = [int(path.name.partition("-")[0]) for path in checkpoint.checkpoints(tmp_path)]
    assert steps == [100_000_000, 10, 9]


def test_a_copy_of_a_checkpoint_under_another_name_is_read(tmp_path):
    path = checkpoint.save_run(tmp_path, 3, STATE, keep=3).rename(tmp_path / "best-of-all.pt")
    assert checkpoint.load_run(path)["progress"] == {"step": 3}


def test_weights_to_start_from(tmp_path, generator_config):
    path = checkpoint.save_run(tmp_path, 3, STATE, keep=3)
    weights = checkpoint.load_weights(path)
    assert weights.keys() == {"generator", "ema", "discriminator"}
    assert torch.equal(weights["ema"]["weight"], STATE["ema"]["weight"])
    clip = load_clip("emoji")
    generator = Generator(replace(generator_config, clip_width=clip.width))
    checkpoint.save_generator(tmp_path / "g.safetensors", *checkpoint.generator_file(generator, clip, 8, {}))
    (tmp_path / "g.safetensors").rename(tmp_path / "g.bin")  # whatever it is called
    weights = checkpoint.load_weights(tmp_path / "g.bin")
    assert weights.keys() == {"generator", "ema"} and weights["ema"].keys() < generator.state_dict().keys()
    for name, value in weights["generator"].items():
        assert torch.equal(value, generator.state_dict()[name])


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"not a checkpoint" * 100, "list", "legacy", "folder"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".pth"])
def test_what_holds_no_weights_is_one_clear_line(tmp_path, content, suffix):
    path = tmp_path / f"x{suffix}"
    if content == "folder":
        path.mkdir()
    elif content == "list":
        torch.save([1, 2], path)
    elif content == "legacy":
        torch.save({"weights": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.(pt|safetensors|pth)") as caught:
        checkpoint.load_weights(path)
    assert len(str(caught.value).splitlines()) == 1
