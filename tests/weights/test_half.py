"""A generator's file in half of its size."""

import shutil

import torch
from safetensors.torch import save_file

from weights import half
from weights.checkpoint import SHAPES, load_generator, read_safetensors


def test_a_file_is_halved_and_read_as_before(run_main, tmp_path):
    run, out = tmp_path / "run", tmp_path / "small.safetensors"
    run.mkdir()
    path = shutil.copy(SHAPES, run / "generator_ema.safetensors")
    assert run_main(half.main, run, "--out", out)[0] == 0
    assert path.read_bytes() == SHAPES.read_bytes()
    assert out.stat().st_size < 0.52 * path.stat().st_size
    generator, clip, notes = load_generator(path)
    again, clip_again, notes_again = load_generator(out)
    assert notes_again == notes and clip_again.kept_ids == clip.kept_ids
    for name, value in generator.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value.half().float(), rtol=0, atol=0)
    assert read_safetensors(out)[1]["generator.w_avg"].dtype == torch.float16


def test_what_holds_no_generator_is_refused(run_main, tmp_path):
    foreign, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"x": torch.ones(2)}, foreign)
    status, _, said = run_main(half.main, foreign, "--out", out)
    assert status == 2 and "holds no generator" in said and not out.exists()
    status, _, said = run_main(half.main, tmp_path, "--out", out)
    assert status == 2 and "no checkpoint" in said


def test_the_generator_itself_is_never_overwritten(run_main, tmp_path):
    path = shutil.copy(SHAPES, tmp_path / "generator_ema.safetensors")
    status, _, said = run_main(half.main, tmp_path, "--out", path)
    assert status == 2 and "full precision would be lost" in said
    assert path.read_bytes() == SHAPES.read_bytes()
