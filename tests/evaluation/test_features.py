"""EfficientNet's weights sit where they belong, images are compared at one resolution, and ranks share the work."""

import itertools

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from clip import load_clip
from common import distributed
from common.cli import UserError
from data import sources
from data.pairs import FORMAT
from evaluation import features
from evaluation.extractors import Extractor
from sampling import latent
from tests import figures
from tests.data.files import good, write_shard
from weights.efficientnet import load_efficientnet


def means_of(pixels):
    return pixels.float().mean((2, 3))


MEANS = {"means": Extractor("mean colors", means_of, None)}


def by_ranks(monkeypatch, count, work):
    """work() on each of `count` ranks, whose distributed.collect sees all of them → their results."""
    sent = []
    monkeypatch.setattr(distributed, "world_size", lambda: count)
    for rank in range(count):  # the first pass notes what each rank sends, in order; the second answers
        calls = []
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "collect", lambda value, calls=calls: calls.append(value) or [value] * count)
        work()
        sent.append(calls)
    results = []
    for rank in range(count):
        answers = iter(list(zip(*sent, strict=True)))
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "collect", lambda _, answers=answers: list(next(answers)))
        results.append(work())
    monkeypatch.undo()
    return results


def photograph():
    """Grace Hopper in uniform, [1, 3, 224, 224] in [−1, 1]: matplotlib's sample picture."""
    path = f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg"
    with Image.open(path) as image:
        square = image.convert("RGB").crop((0, 0, image.width, image.width)).resize((224, 224))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)[None] / 127.5 - 1


def test_efficientnet_knows_what_is_in_a_photograph():
    """Another order of the package's tensors, of equal shapes, would not."""
    word = load_efficientnet()(photograph())[0].argmax().item()
    assert "military uniform" in ImageNetInfo().index_to_description(word)


@pytest.mark.parametrize(("resolution", "own"), [(8, 8), (24, 32), (64, 32)])
def test_a_lower_output_of_the_generator_is_taken_as_it_is(demo, resolution, own):
    seen = []
    spy = {"spy": Extractor("", lambda pixels: seen.append(pixels) or means_of(pixels), None)}
    captions = ["red circle"] * 2
    features.extract_generated(features.drawing(*demo, resolution), captions, 7, resolution, spy)
    assert features.own_resolution(demo[0], resolution) == own
    z = latent.noise(demo[0], 2, seed=7)
    (output,) = latent.generate(*demo, captions, z)
    assert torch.equal(seen[0], features.to_pixels(output.pyramid[own], resolution))
    assert seen[0].shape == (2, 3, resolution, resolution)
    features.extract_real(figures.Figures(48), 4, resolution, spy)
    assert seen[1].shape[-1] == seen[0].shape[-1]  # an FID is between images of one size


def test_real_features_do_not_depend_on_the_number_of_ranks(tmp_path, monkeypatch):
    source = sources.open_data(str(figures.write(tmp_path, count=11)), 16, seed=0)

    def work():
        return features.extract_real(source, 5, 16, MEANS)

    captions, expected, _ = work()
    assert len(captions) == 10
    for found, values, _ in by_ranks(monkeypatch, 3, work):
        assert found == captions and torch.equal(values["means"], expected["means"])


def test_too_few_images_are_refused_and_skipped_ones_counted(tmp_path, monkeypatch):
    """Of eleven pairs with two captions each, the fifth is broken."""
    samples = [{**good(i), "txt": f"picture {i}\nthe {i}th".encode()} for i in range(11)]
    samples[4]["jpg"] = b"broken"
    write_shard(tmp_path / "00000.tar", samples)
    source = sources.open_data(str(tmp_path / "00000.tar"), 16, seed=0)
    for captions, values, skipped in by_ranks(monkeypatch, 2, lambda: features.extract_real(source, 9, 16, MEANS)):
        assert len(captions) == len(values["means"]) == 10 and skipped == {FORMAT: 1}
    with pytest.raises(UserError, match="the data has 10 usable images"):
        features.extract_real(source, 12, 16, MEANS)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_generate_different_images_and_together_those_of_one(demo, monkeypatch, ranks):
    """In evaluate.py, and for the FID in training. Fails if all ranks process the same share."""
    captions, clip = [figures.caption(i) for i in range(5)], load_clip("emoji")

    def generated():
        return features.extract_generated(features.drawing(*demo, 16), captions, 0, 16, MEANS)["means"]

    def in_training():
        return features.extract_fake_features(demo[0], clip, captions, 16, seed=0)

    for work in (generated, in_training):
        expected = work()
        assert len(expected) == 5 and all(not torch.equal(a, b) for a, b in itertools.combinations(expected, 2))
        for found in by_ranks(monkeypatch, ranks, work):
            torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-3)
