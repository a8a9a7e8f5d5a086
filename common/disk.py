"""Writing files so that a crash, a full disk or a loss of power leaves the old one whole, or the new one."""

import contextlib
import os
import re
import secrets
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from common.cli import first_line


def atomically(path, write):
    """Calls write(temporary path), then renames: whoever reads `path` finds the old file or the new one, whole.

    The file is on the disk before it takes its name, so that this holds where a machine loses power too. Raises OSError
    where the disk does not take it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.tmp")  # a name that no file has yet
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors lets the owner alone read its files
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


def left_over(folder, names):
    """The temporary files that a killed `atomically` left in a folder. names: a pattern of the files it wrote."""
    ours = re.compile(rf"\.({names})\.[0-9a-f]{{8}}\.tmp")
    return [path for path in folder.glob(".*.tmp") if ours.fullmatch(path.name)]


def rename(temporary, path):
    """Gives a file its name once it is on the disk."""
    flush(temporary, os.O_RDWR)  # Windows flushes only what is open for writing
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # Windows opens no folder, and some network disks flush none
        flush(path.parent, os.O_RDONLY)


def flush(path, mode):
    """Waits until a file, or the list of what a folder holds, is on the disk."""
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
