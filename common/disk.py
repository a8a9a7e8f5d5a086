"""Writing files so that a crash, a full disk or a loss of power leaves the old one whole, or the new one; and reading
tensors so that no code in their file runs.
"""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError

from common.cli import UserError, first_line


class Damaged(UserError):
    """A file does not hold what was written to it."""


def atomically(path, write):
    """Calls write(temporary path), then renames: whoever reads `path` finds the old file or the new one, whole.

    The file is on the disk before it takes its name, so that this holds where a machine loses power too. What a killed
    process left unfinished, the next one writes over. Raises OSError where the disk does not take it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:50]}.unfinished")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors lets the owner alone read its files
        flush(temporary)
        rename(temporary, path)
    except SafetensorError as error:  # its word for an error of the disk
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else None, first_line(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_room(folder, size=2**25):
    """Writes so many bytes for a moment: a full disk is better met before long work than after. Raises OSError."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(size))
            file.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def link(source, path):
    """Gives a file another name, atomically; where the disk has no links, a copy."""

    def write(temporary):
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    atomically(path, write)


def rename(temporary, path):
    """Gives a file or folder its name, in place of what had it."""
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # Windows opens no folder, and some network disks flush none
        flush(path.parent, os.O_RDONLY)


def flush(path, mode=os.O_RDWR):  # Windows flushes only what is open for writing
    """Waits until a file, or the list of what a folder holds, is on the disk."""
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(state, path):
    """torch.save, of tensors and plain values in any nest. Raises OSError, which PyTorch would hide in its own."""
    errors = []

    class Writer:
        def __init__(self, file):
            self.file, self.flush = file, file.flush

        def write(self, data):
            try:
                return self.file.write(data)
            except OSError as error:
                errors.append(error)
                raise

    with open(path, "wb") as file:
        try:
            torch.save(state, Writer(file))
        except RuntimeError as error:
            raise errors[0] if errors else OSError(first_line(error)) from error


def load_tensors(path, mmap=False):
    """What write_tensors wrote: no code in it can run.

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


def digest(path):
    """Sixteen digits that tell a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
