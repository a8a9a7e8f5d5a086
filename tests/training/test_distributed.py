"""The number of ranks changes nothing: gradients of a whole step; a run that is stopped and goes on."""

import os
import subprocess
import sys

import pytest
import torch

from common import distributed
from common.cli import UserError
from tests import ROOT, figures
from tests.training.gradients_of_a_step import gradients
from tests.training.runs import log_of


def torchrun(ranks, *command, restarts=0):
    """Runs a command on this number of ranks."""
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {ranks} --max-restarts {restarts}"
    command = [sys.executable, *launcher.split(), *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


def test_ranks_have_the_gradients_of_one_process_and_share_a_mistake(tmp_path):
    """Adversarial, matching, CLIP, R1 and expert losses together, tensor by tensor; crops, noise and distances to the
    truth in the second stage; and micro-batches, each shared by all ranks. Of a mistake, one rank has the message.
    """
    done = torchrun(2, "-m", "tests.training.gradients_of_a_step", tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr
    one, (two, messages) = gradients(), torch.load(tmp_path / "two.pt")
    assert messages == ["a mistake of rank 1", ""]
    assert one.keys() == two.keys() and len(one) > 300
    for name, gradient in one.items():
        if "to_rgb.bias" in name and gradient.abs().max() < 1e-14:  # zero but for rounding: it shifts no color
            assert two[name].abs().max() < 1e-14, name
        else:
            assert (two[name] - gradient).abs().max() < 1e-10 * gradient.abs().max() + 1e-15, name


def test_two_ranks_start_grow_stop_and_go_on(tmp_path, monkeypatch):
    """train.py's main: reference FID, steps with R1 and without, evaluation, growth, saving, resuming."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # as in examples/slurm.sh
    options = f"--preset tiny-larger --steps 5 --batch 4 --set fid_samples=8 fid_every=8 --data {figures.folder()}"
    options += f" --clip emoji --workers 0 --device cpu --sample-every 2 --out {tmp_path / 'run'}"
    done = torchrun(2, "-m", "tests.training.stopped_rank", *options.split(), restarts=1)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "2 rank(s)" in said
    assert said.count("Stopped and saved") == said.count("Resuming from step 3.") == said.count("Done; ") == 1
    rows = log_of(tmp_path / "run")
    assert [(row["step"], row["resolution"]) for row in rows] == [(1, 16), (2, 32), (3, 32), (4, 32), (5, 32)]
    assert [row["step"] for row in rows if "r1" in row] == [1]
    assert [row["step"] for row in rows if "fid" in row] == [2, 4]
    assert all(row["rejected"] == 0 for row in rows)


def test_an_incomplete_launch_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="LOCAL_RANK is not"):
        distributed.start("cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="WORLD_SIZE expected, but not set; start all of them with torchrun, or unset"):
        distributed.start("cpu")


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, **__: None)
    assert distributed.start("auto") == torch.device("cuda", 1)


def test_float32_is_not_tf32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    distributed.start("cpu")
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
