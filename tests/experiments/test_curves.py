"""The curves and the timeline of a run."""

import json

import pytest
from PIL import Image

from common.cli import UserError
from experiments.curves import plot, points, read_log, timeline
from sampling.pictures import CELL, MARGIN, grid


def test_a_sparse_value_stands_where_it_was_measured_and_a_dense_one_is_smoothed():
    rows = [{"images": 10 * i, "loss": float(i)} | ({"fid": 5.0} if i == 2 else {}) for i in range(4)]
    assert points(rows, "fid") == ([20], [5.0])
    assert points(rows, "loss") == ([0, 10, 20, 30], [0.0, 0.5, 1.0, 1.5])


def test_a_log_becomes_a_picture(tmp_path):
    names = (
        "d_loss",
        "g_loss",
        "logits_real",
        "logits_fake",
        "logits_wrong",
        "expert_min_share",
        "fid",
        "reference_fid",
    )
    rows = [{"images": i, "resolution": 16 * (1 + i // 3), **dict.fromkeys(names, 1.0)} for i in range(6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plot(read_log(tmp_path / "metrics.jsonl"), tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 500
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="no step yet"):
        read_log(tmp_path / "empty.jsonl")


def test_a_timeline_has_the_first_row_of_each_step(tmp_path):
    (tmp_path / "samples").mkdir()
    for step, color in ((1, "red"), (2, "blue")):
        panels = [Image.new("RGB", (CELL, CELL), color if i < 8 else "white") for i in range(24)]
        grid(panels, ["a caption"] * 24, 8).save(tmp_path / "samples" / f"step_{step:07d}.png")
    timeline(tmp_path, [1, 2], tmp_path / "timeline.png")
    picture = Image.open(tmp_path / "timeline.png")
    middle = picture.width // 2
    assert picture.getpixel((middle, CELL // 2)) == (255, 0, 0)
    assert picture.getpixel((middle, CELL + MARGIN + CELL // 2)) == (0, 0, 255)
    with pytest.raises(UserError, match="name steps that the run has drawn"):
        timeline(tmp_path, [3], tmp_path / "timeline.png")
