"""Folders and shards as people have them, broken ones included."""

import io
import itertools
import json
import tarfile

import pytest
import torch
from PIL import Image

import data
from errors import UserError


def jpeg(color, size=(40, 30), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]


@pytest.fixture
def folder(tmp_path):
    for i, color in enumerate(COLORS):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(color))
        (tmp_path / f"{i}.txt").write_text(f"picture {i}\n", encoding="utf-8")
    return tmp_path


def write_shard(path, samples):
    """As img2dataset does: key.jpg, key.txt and key.json beside each other, and a statistics file by the shard."""
    with tarfile.open(path, "w") as tar:
        for i, files in enumerate(samples):
            for suffix, content in {**files, "json": json.dumps({"key": i, "status": "success"}).encode()}.items():
                info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    path.with_name(path.stem + "_stats.json").write_text(json.dumps({"successes": len(samples)}))


def good(i):
    return {"jpg": jpeg(COLORS[i % 6]), "txt": f"picture {i}".encode()}


def take(source, count, **kwargs):
    return list(itertools.islice(source.batches(range(0, 2**62), **kwargs), count))


def colour_of(image):
    return tuple(int(v > 0) * 255 for v in image.mean((1, 2)))


def test_a_folder_gives_pairs_that_belong_together(folder):
    source = data.open_data(str(folder), 16, seed=0)
    (batch,) = take(source, 1, batch=6, rank=0, world_size=1)
    assert batch.images.shape == (6, 3, 16, 16) and batch.images.min() >= -1 and batch.images.max() <= 1
    assert sorted(batch.captions) == [f"picture {i}" for i in range(6)]  # an epoch holds each once
    for image, caption in zip(batch.images, batch.captions, strict=True):
        assert colour_of(image) == COLORS[int(caption[-1])]


@pytest.mark.parametrize("kind", ["shapes", "folder"])
def test_ranks_share_the_global_batch_and_any_step_can_be_the_first(kind, folder):
    source = data.open_data("shapes" if kind == "shapes" else str(folder), 16, seed=3)
    whole = take(source, 3, batch=4, rank=0, world_size=1)
    shares = [take(source, 3, batch=2, rank=rank, world_size=2) for rank in range(2)]
    for step in range(3):
        assert whole[step].captions == shares[0][step].captions + shares[1][step].captions
    later = next(source.batches(range(2, 2**62), 4, 0, 1))
    assert later.captions == whole[2].captions and torch.equal(later.images, whole[2].images)


def test_workers_keep_the_order(folder):
    source = data.open_data(str(folder), 16, seed=3)
    captions = [
        [batch.captions for batch in itertools.islice(data.loader(source, 5, 4, workers), 4)] for workers in (0, 2)
    ]
    assert captions[0] == captions[1]


def test_broken_images_and_captions_are_skipped_and_counted(folder):
    (folder / "0.jpg").write_bytes(b"<html>not an image</html>")
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:100])
    (folder / "2.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "3.txt").write_text("  ")
    (batch,) = take(data.open_data(str(folder), 16, seed=0), 1, batch=6, rank=0, world_size=1)
    assert len(batch.captions) == 6 and set(batch.captions) == {"picture 4", "picture 5"}
    assert batch.skipped >= 4


def test_pictures_of_every_mode_are_read(folder):
    Image.new("L", (20, 50), 200).save(folder / "0.png")
    Image.new("RGBA", (20, 50), (1, 2, 3, 4)).save(folder / "a.png")
    Image.new("P", (20, 50), 3).save(folder / "b.png")
    (folder / "c.jpg").write_bytes(jpeg((1, 2, 3, 4), mode="CMYK"))
    for name in "abc":
        (folder / f"{name}.txt").write_text(name)
    (batch,) = take(data.open_data(str(folder), 8, seed=0), 1, batch=10, rank=0, world_size=1)
    assert batch.images.shape == (10, 3, 8, 8) and batch.skipped == 0


@pytest.mark.parametrize("content", ["nothing", "no captions", "missing", "a file"])
def test_a_folder_without_pairs_is_one_clear_line(tmp_path, content):
    path = tmp_path / "data"
    if content == "a file":
        path.write_text("x")
    elif content != "missing":
        path.mkdir()
    if content == "no captions":
        (path / "1.jpg").write_bytes(jpeg((1, 2, 3)))
    with pytest.raises(UserError, match="--data"):
        data.open_data(str(path), 16, seed=0)


def test_a_folder_of_which_nothing_can_be_read_says_so(folder):
    for path in folder.glob("*.jpg"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="none of the 6 pairs"):
        next(data.loader(data.open_data(str(folder), 16, seed=0), 0, 4, workers=1))


def test_shards_as_img2dataset_writes_them(tmp_path):
    for shard in range(2):
        write_shard(tmp_path / f"{shard:05d}.tar", [good(6 * shard + i) for i in range(6)])
    for spec in (str(tmp_path), str(tmp_path / "{00000..00001}.tar"), str(tmp_path / "00000.tar")):
        source = data.open_data(spec, 16, seed=0)
        first, second = take(source, 2, batch=5, rank=0, world_size=1)
        assert first.images.shape == (5, 3, 16, 16) and first.captions != second.captions
        for image, caption in zip(first.images, first.captions, strict=True):
            assert colour_of(image) == COLORS[int(caption.split()[1]) % 6]
        again = take(source, 2, batch=5, rank=0, world_size=1)
        assert again[1].captions == second.captions  # the same start, the same stream
    other = take(data.open_data(str(tmp_path), 16, seed=0), 4, batch=5, rank=1, world_size=2)
    assert [b.captions for b in other] != [b.captions for b in take(source, 4, batch=5, rank=0, world_size=2)]


def test_a_shard_cut_short_and_broken_samples_are_skipped_and_counted(tmp_path):
    broken = [
        {"jpg": b"<html>", "txt": b"x"},
        {"jpg": jpeg((1, 2, 3))},
        {"txt": b"x"},
        {"jpg": jpeg((1, 2, 3)), "txt": b" "},
    ]
    write_shard(tmp_path / "00000.tar", [good(0), *broken, good(1)])
    write_shard(tmp_path / "00001.tar", [good(i) for i in range(2, 8)])
    whole = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(whole[: len(whole) // 2 + 300])
    batches = take(data.open_data(str(tmp_path), 16, seed=0), 6, batch=4, rank=0, world_size=1)
    captions = {caption for batch in batches for caption in batch.captions}
    assert {"picture 0", "picture 1", "picture 2"} <= captions
    assert sum(batch.skipped for batch in batches) >= 5


@pytest.mark.parametrize("content", [b"", b"not a tar" * 100])
def test_shards_without_a_pair_are_one_clear_line(tmp_path, content):
    (tmp_path / "00000.tar").write_bytes(content)
    with pytest.raises(UserError, match="not one readable pair"):
        data.open_data(str(tmp_path), 16, seed=0)
    with pytest.raises(UserError, match="braces do not match"):
        data.open_data(str(tmp_path / "{00007.tar"), 16, seed=0)
    with pytest.raises(UserError, match="no such shard"):
        data.open_data(str(tmp_path / "{00007..00009}.tar"), 16, seed=0)


def test_evaluation_scenes_are_not_the_training_ones():
    source = data.Scenes(8, seed=0)
    training = {c for batch in take(source, 20, batch=8, rank=0, world_size=1) for c in batch.captions}
    first = next(source.evaluation(8))
    assert next(source.evaluation(8)).captions == first.captions
    images = torch.cat([batch.images for batch in take(source, 20, batch=8, rank=0, world_size=1)])
    assert training and not any((images == image).all((1, 2, 3)).any() for image in first.images)
    assert first.images.isfinite().all()
