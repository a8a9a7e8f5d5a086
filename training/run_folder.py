"""The folder of a run: its checkpoints, its log, its pictures, its generator. The main rank writes it, for all."""

import functools
import json
from pathlib import Path

import numpy as np

from common import distributed
from common.cli import UserError, first_line
from common.distributed import say
from weights import checkpoint

GROUPS = {"d_": "discriminator", "lo": "discriminator", "r1": "discriminator", "g_": "generator", "fi": "FID"}


def written(what):
    """Makes a method one that the main rank alone calls, and that a full disk does not stop: it says so and goes on."""

    def decorate(method):
        @functools.wraps(method)
        def by_main(self, *args):
            if distributed.is_main():
                try:
                    method(self, *args)
                except OSError as error:
                    say(f"note: {what} could not be written ({error.strerror or first_line(error)}); the run goes on")

        return by_main

    return decorate


class RunFolder:
    """config.json, metrics.jsonl, samples/, checkpoints/ and generator_ema.safetensors; and tensorboard/, if wanted.

    identity: {option: value}, what a run may not be gone on with another of.
    """

    def __init__(self, path, identity, with_board=False):
        self.path, self.identity, self.with_board = path, identity, with_board
        self.checkpoints = path / "checkpoints"
        self.last_good = None  # the newest checkpoint that is known to be whole
        self.saved_step = None
        self.log_file = self.board = None

    def prepare(self):
        """Makes what is missing, and removes what a killed run left unfinished. Raises UserError."""
        try:
            for folder in (self.checkpoints, self.path / "samples"):
                folder.mkdir(parents=True, exist_ok=True)
            for unfinished in self.path.glob("**/*.tmp"):
                unfinished.unlink()
        except OSError as error:
            raise UserError(f"--out {self.path} cannot be written: {error.strerror}") from error

    def state(self, resume):
        """The state that a run goes on from, on every rank, or None for a new run. resume: as --resume.

        Raises UserError where the folder, the checkpoint and the run do not go together.
        """
        with distributed.together():
            path, state = self.find(resume) if distributed.is_main() else (None, None)
        self.last_good = distributed.broadcast(path)
        with distributed.together():
            return checkpoint.load_run(self.last_good) if self.last_good and not state else state

    def find(self, resume):
        """→ the path of the checkpoint to go on from, and its state; or None and None."""
        self.prepare()
        held = checkpoint.checkpoints(self.checkpoints)
        if self.generator.exists() and not held:
            raise UserError(f"{self.path} holds a generator but no checkpoint to go on from; give another --out")
        if resume == "auto":
            path, state = checkpoint.newest_run(self.checkpoints, say)
        elif held:
            raise UserError(f"--resume {resume}, but {self.path} holds a run of its own; give another --out")
        elif resume == "no":
            return None, None
        elif not Path(resume).is_file():
            raise UserError(f"--resume {resume}: no such checkpoint; use auto to go on in --out, or no to start afresh")
        else:
            path, state = Path(resume), checkpoint.load_run(resume)
        then = state["identity"] if state else self.identity
        changed = [name for name, value in self.identity.items() if then.get(name) != value]
        if changed:
            now = ", ".join(f"--{name} {then.get(name)}" for name in changed)
            raise UserError(f"the run in {path} was started with {now}; repeat that, or give another --out")
        return path, state

    @property
    def generator(self):
        return self.path / "generator_ema.safetensors"

    @written("config.json")
    def write_config(self, config):
        (self.path / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @written("metrics.jsonl")
    def open_log(self, step):
        """Opens the log, without the lines of steps after `step`, which are about to be made again."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = "".join(line + "\n" for line in lines if 0 < step_of(line) <= step)
        checkpoint.atomically(path, lambda temporary: temporary.write_text(kept))
        self.log_file = path.open("a")
        if self.with_board:
            from torch.utils.tensorboard import SummaryWriter  # here, as it takes a second to import

            self.board = SummaryWriter(self.path / "tensorboard", purge_step=step + 1)

    @written("metrics.jsonl")
    def log(self, row):
        self.log_file.write(json.dumps(row) + "\n")
        self.log_file.flush()
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(f"{GROUPS.get(name[:2], 'run')}/{name}", value, row["step"])

    @written("a picture of samples")
    def write_picture(self, picture, loads, step):
        """A grid of samples, and what share of their points each expert took, {router: [E]}."""
        path = self.path / "samples" / f"step_{step:07d}.png"
        checkpoint.atomically(path, lambda temporary: picture.save(temporary, "PNG"))
        if self.board:
            self.board.add_image("samples", np.asarray(picture), step, dataformats="HWC")
            for router, shares in loads.items():
                for expert, share in enumerate(shares.tolist()):
                    self.board.add_scalar(f"experts/{router}, share of expert {expert}", share, step)
            self.board.flush()

    @written("a checkpoint")
    def save(self, step, state, keep, write_generator):
        """state: all that a run needs to go on; the last `keep` of such files stay. write_generator: path → file."""
        self.last_good = checkpoint.save_run(self.checkpoints, step, {"identity": self.identity, **state}, keep)
        self.saved_step = step
        write_generator(self.generator)


def step_of(line):
    """The step of a line of metrics.jsonl, or 0 for one that was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return 0
