"""The nearest training pictures are those of the largest cosine, and the command draws them."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from experiments import nearest
from tests import figures
from training import small_clip


def test_the_nearest_are_those_of_the_largest_cosine():
    torch.manual_seed(0)
    features, others = torch.randn(4, 5), torch.randn(9, 5)
    cosines, indices = nearest.nearest(F.normalize(features, dim=1), F.normalize(others, dim=1))
    for i in range(4):
        expected = sorted(range(9), key=lambda j: -F.cosine_similarity(features[i], others[j], dim=0))[:3]
        assert indices[i].tolist() == expected
        assert cosines[i, 0].item() == pytest.approx(
            F.cosine_similarity(features[i], others[expected[0]], dim=0).item()
        )


def test_the_picture_has_a_row_for_each_prompt(tmp_path, monkeypatch, run_main):
    """Of so few training pictures that each is near; the file is what its name says. Broken pictures are reported."""
    monkeypatch.setattr(nearest, "MOST", 2)
    data = figures.write(tmp_path / "data")
    for path in sorted(data.glob("*.png"))[3:]:
        path.write_bytes(b"broken")
    options = ["--data", data, "--checkpoint", figures.generator_file(), "--out", tmp_path / "nearest.jpg"]
    status, printed, error = run_main(nearest.main, *options, "red circle", "large blue square")
    assert status == 0 and printed.count("note: skipped and counted: files that are no picture") == 1, error
    for main in (nearest.main, small_clip.main):  # a picture of the data is not overwritten
        own = sorted(data.glob("*.png"))[0]
        status, _, error = run_main(main, "--data", data, "--out", own, *["red circle"] * (main == nearest.main))
        assert status == 2 and "this command did not make it" in error and Image.open(own).format == "PNG"
    picture = Image.open(tmp_path / "nearest.jpg")
    assert picture.format == "JPEG" and 4 * 128 > picture.width > 3 * 128 and picture.height > 2 * 128
