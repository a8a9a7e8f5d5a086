"""The files in a .tar, from a disk, a web server or a command, and the samples that they make up.

A shard on a disk can be read from any place on: tar files are chains of headers, and each header has a checksum, so the
next one is found from anywhere.
"""

import contextlib
import gzip
import io
import os
import select
import signal
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

from data.pairs import DUPLICATE, IMAGE_SUFFIXES, MAX_FACTS, MAX_FILE, MAX_TEXT

BLOCK = tarfile.BLOCKSIZE
READ_TIMEOUT = 60  # seconds in which a command must write something
PENDING = 2**28  # bytes of incomplete samples that are kept for a part that comes later
LIMITS = {".txt": MAX_TEXT, ".json": MAX_FACTS} | dict.fromkeys(IMAGE_SUFFIXES, MAX_FILE)  # bytes that are read
FETCH = {  # how a URL is read: the command, before the URL and after it
    "http": (["curl", "-sSfL", "--connect-timeout", "30"], []),
    "https": (["curl", "-sSfL", "--connect-timeout", "30"], []),
    "ftp": (["curl", "-sSfL", "--connect-timeout", "30"], []),
    "s3": (["aws", "s3", "cp"], ["-"]),
    "gs": (["gcloud", "storage", "cat"], []),
}
ERRORS = (OSError, EOFError, tarfile.TarError, zlib.error)  # what reading a shard may raise


class Piped(io.RawIOBase):
    """What a command writes, as a file. Raises OSError, in the command's own words, where it fails or falls silent."""

    def __init__(self, command):
        self.process, self.errors = None, tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        own_group = os.name == "posix"  # so that what a shell starts can be ended with it
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": self.errors}
        try:
            shell = isinstance(command, str)
            self.process = subprocess.Popen(command, shell=shell, bufsize=0, start_new_session=own_group, **streams)
        except FileNotFoundError as error:
            raise OSError(f"there is no command {command[0]} here") from error

    def readable(self):
        return True

    def readinto(self, buffer):
        if os.name == "posix" and not select.select([self.process.stdout], [], [], READ_TIMEOUT)[0]:
            raise OSError(f"nothing came for {READ_TIMEOUT} s")
        count = self.process.stdout.readinto(buffer)
        if count == 0 and (status := self.process.wait()) != 0:
            self.errors.seek(0)
            lines = self.errors.read(10_000).decode(errors="replace").strip().splitlines() or ["no word"]
            raise OSError(f"{lines[-1][:200]} (exit status {status})")
        return count

    def close(self):
        if self.process and not self.closed:
            if self.process.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(self.process.pid, signal.SIGKILL) if os.name == "posix" else self.process.kill()
            self.process.stdout.close()
            self.process.wait()
        self.errors.close()
        super().close()


def command_of(url):
    """The command that writes a shard to its output, or None for a file on the disk."""
    if url.startswith("pipe:"):
        return url.removeprefix("pipe:")
    before, after = FETCH.get(url.partition("://")[0], (None, None))
    return None if before is None else [*before, url, *after]


def is_file(url):
    """Whether a shard is on a disk, so that it can be read from any place on."""
    return command_of(url) is None


def local(url):
    return url.removeprefix("file://")


@contextlib.contextmanager
def opened(url):
    """A shard, as a binary file without compression, and its size; None for what a command writes."""
    if command := command_of(url):
        with io.BufferedReader(Piped(command), 2**20) as file:
            yield file, None
        return
    path = Path(local(url))
    with open(path, "rb") as file:
        if file.read(2) != b"\x1f\x8b":
            yield file, path.stat().st_size
            return
        file.seek(-4, os.SEEK_END)
        size = int.from_bytes(file.read(4), "little")  # up to 4 GiB; of more, the rest is no place to start from
        file.seek(0)
        with gzip.open(file) as unpacked:
            yield unpacked, size


def aligned(file, offset):
    """Moves to the first header at `offset` or after it → whether there is one."""
    file.seek(offset // BLOCK * BLOCK)
    while len(block := file.read(BLOCK)) == BLOCK:
        with contextlib.suppress(tarfile.HeaderError):
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            file.seek(-BLOCK, os.SEEK_CUR)
            return True
    return False


def members(url, start=0.0):
    """(key, suffix, bytes) of the files in a shard, once each, from a share `start` of it on and then from its front.

    The key is the name without its last suffix. Of a file that is no image, caption or .json the bytes are None, of one
    that is too large they are cut. What a command writes is read from the front. Raises one of ERRORS.
    """
    with opened(url) as (file, size):
        if size is None:
            for _, *member in headers(file, "r|*"):
                yield member
            return
        begin, error = size, None
        try:
            if start and aligned(file, int(start * size)):
                first = None
                for offset, key, *rest in headers(file, "r:"):
                    first = first or key
                    if begin == size and key != first:  # of the sample before, a part may be missing
                        begin = offset
                    if offset >= begin:
                        yield key, *rest
        except ERRORS as cut:
            error = cut  # what is before the cut can be read
        file.seek(0)
        for offset, *member in headers(file, "r:"):
            if offset >= begin:
                break
            yield member
        if error:
            raise error


def headers(file, mode):
    """(offset, key, suffix, bytes) of the files in a tar from where an open file stands. mode: of tarfile.open."""
    with tarfile.open(fileobj=file, mode=mode) as tar:
        while (info := tar.next()) is not None:
            tar.members = []  # else it remembers all
            folder, _, name = info.name.rpartition("/")
            if not info.isfile() or name.startswith(".") or "__MACOSX" in folder:
                continue
            stem, _, suffix = name.rpartition(".")
            suffix = f".{suffix}".lower() if stem else ""
            limit = LIMITS.get(suffix)
            data = tar.extractfile(info).read(limit) if limit else None
            yield info.offset, f"{folder}/{stem or name}".lstrip("/"), suffix, data
        if mode == "r:":
            file.seek(tar.offset)
            if any(file.read(BLOCK)):  # tarfile takes a broken header for the end
                raise tarfile.ReadError(f"no header at byte {tar.offset}")


def samples(found, tally, wanted):
    """Members → samples (key, {suffix: bytes}), each as soon as it is complete and the next has begun.

    A sample's files may lie apart: first all images, then all captions. wanted: suffixes of which each sample has one;
    a tuple of tuples. Incomplete ones come at the end, or when they take more than PENDING bytes.
    """
    pending, size, last = {}, 0, None

    def complete(parts):
        return all(any(suffix in parts for suffix in kinds) for kinds in wanted)

    def taken(key):
        parts = pending.pop(key)
        return key, parts, sum(map(len, filter(None, parts.values())))

    for key, suffix, data in found:
        if last in pending and key != last and complete(pending[last]):
            *sample, freed = taken(last)
            size -= freed
            yield sample
        last = key
        parts = pending.setdefault(key, {})
        if suffix in parts:
            tally.skip(DUPLICATE, f"{key}{suffix}")
            continue
        parts[suffix] = data
        size += len(data or b"")
        while size > PENDING and len(pending) > 1:
            *sample, freed = taken(next(iter(pending)))
            size -= freed
            yield sample
    for key in list(pending):
        yield taken(key)[:2]
