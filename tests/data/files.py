"""Folders and shards of tiny captioned images, and the batches that a source makes of them."""

import io
import itertools
import json
import tarfile

from PIL import Image

from data import sources

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]


def encoded(image, kind="PNG", **options):
    """A PIL image → the bytes of its file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(color, size=(48, 36), mode="RGB"):
    return encoded(Image.new(mode, size, color), "JPEG", quality=95)


PICTURE = jpeg((9, 9, 9), size=(16, 16))


def good(i):
    return {"jpg": jpeg(COLORS[i % 6]), "txt": f"picture {i}".encode()}


def numbered(count, first=0):
    """Samples whose caption is their number."""
    return [{"jpg": b"x%d" % i, "txt": b"%d" % i} for i in range(first, first + count)]


def named(samples):
    """[{suffix: bytes}] → [(file name, bytes)], sample by sample."""
    return [(f"{i:06d}.{suffix}", content) for i, parts in enumerate(samples) for suffix, content in parts.items()]


def write_folder(path, files):
    path.mkdir(exist_ok=True)
    for name, content in files:
        (path / name).write_bytes(content)
    return str(path)


def write_tar(path, files, mode="w", **options):
    """files: (name, bytes) in their order."""
    with tarfile.open(path, mode, **options) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def write_shard(path, samples):
    """As img2dataset does: key.jpg, key.txt and key.json."""
    facts = [{"json": json.dumps({"key": i, "status": "success"}).encode()} for i in range(len(samples))]
    write_tar(path, named([sample | fact for sample, fact in zip(samples, facts, strict=True)]))


def source_of(spec, **options):
    return sources.open_data(str(spec), 16, seed=0, **options)


def opened(kind, path, files, **options):
    """A source of files, [(name, bytes)], in a folder, or in a shard, of the kind tar."""
    path.mkdir(exist_ok=True)
    if kind == "folder":
        return source_of(write_folder(path, files), **options)
    return source_of(write_tar(path / f"0.{kind}", files), **options)


def take(source, count, first=0, **share):
    """The first batches of training, of four pairs unless `share` says otherwise."""
    share = {"batch": 4, "rank": 0, "world_size": 1} | share
    return list(itertools.islice(source.batches(range(first, 2**62), **share), count))


def captions_of(batches):
    return [caption for batch in batches for caption in batch.captions]


def seen(source, steps, **share):
    """The captions of training."""
    return captions_of(take(source, steps, **share))


def all_captions(source, **options):
    """The captions of evaluation, sorted."""
    return sorted(captions_of(source.evaluation_batches(**options)))
