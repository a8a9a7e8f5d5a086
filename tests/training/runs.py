"""Short runs of train.py, and comparisons of their states."""

import json

import torch

import train
from tests import figures
from weights import checkpoint

SHORT = ("--preset", "quick", "--data", figures.folder(), "--clip", "emoji", "--workers", 0, "--device", "cpu")
SHORT += ("--sample-every", 2, "--save-every", 1, "--keep", 9)


def build(*arguments):
    return train.build(train.parse_args([str(a) for a in arguments]), torch.device("cpu"))


def run(*arguments):
    """Runs train.py to its end → train.Run."""
    made = build(*arguments)
    train.train(made)
    return made


def state_of(out):
    """The state in the newest checkpoint of a run, without what differs from run to run."""
    state = checkpoint.newest(out / "checkpoints")[1]
    state["progress"].pop("seconds")
    del state["identity"]
    return state


def log_of(out):
    """The rows of a run's log, a dict for each step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


def identical(a, b):
    """Whether two nested dicts or lists are bit-identical."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
