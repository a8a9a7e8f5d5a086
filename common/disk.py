"""Writes files so that after a crash, a full disk or a loss of power the old file or the new one is whole; and reads
tensors so that no code in their file runs.
"""

import contextlib
import hashlib
import os
import warnings
from pathlib import Path

import torch

from common.cli import DISK_IS_FULL, UserError, first_line

UNFINISHED = ".unfinished"  # the end of a temporary name


class Damaged(UserError):
    """A file does not contain what was written to it."""


def atomically(path, write):
    """Calls write(temporary path), then renames: a reader of `path` finds the whole old file or the whole new one.

    The file is on the disk before it gets its name, so this is true after a loss of power too. Two processes may write
    the same file. Raises OSError if the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}{UNFINISHED}")
    try:
        temporary.unlink(missing_ok=True)
        write(temporary)
        flush(temporary)
        rename(temporary, path)
    except OSError as error:
        if str(error.filename) == str(temporary) or error.errno in DISK_IS_FULL:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def delete_unfinished(folder):
    """Deletes what killed processes left in a folder. No other process may be writing there."""
    for path in folder.glob(f".*.[0-9]*{UNFINISHED}"):
        with contextlib.suppress(OSError):  # such as a folder
            path.unlink()


def write_text(path, content):
    """Writes a UTF-8 file atomically. Raises OSError."""
    atomically(path, lambda temporary: temporary.write_text(content, "utf-8"))


def rename(temporary, path):
    """Renames a file or folder, and replaces what had that name."""
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # some network disks cannot flush a folder
        flush(path.parent)


def flush(path):
    """Waits until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(state, path):
    """torch.save for nested tensors and plain values. Raises the OSError that PyTorch hides in its own error."""
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            hidden = error.__context__
            raise hidden if isinstance(hidden, OSError) else OSError(first_line(error)) from None


def load_tensors(path, mmap=False):
    """Reads what write_tensors wrote; no code in the file can run.

    mmap: leave the tensors on the disk until they are used. Raises Damaged; or another UserError if the disk or the
    memory fails.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, MemoryError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    except Exception as error:  # the unpickler raises all kinds of errors on foreign bytes
        reason = "it is damaged, or no checkpoint, or contains code, which is not run"
        raise Damaged(f"{path} cannot be read: {reason}") from error


def digest(path):
    """Sixteen hexadecimal digits that identify a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def digest_of(tensors):
    """The same for the content of tensors, {name: tensor}."""
    sha256 = hashlib.sha256()
    for _, value in sorted(tensors.items()):
        sha256.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()[:16]
