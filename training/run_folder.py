"""The folder of a run: checkpoints, log, pictures and generator. The main rank writes it for all."""

import fcntl
import functools
import json
import math
import os
import shlex
import shutil

import torch

from clip import BUILT_IN
from common import disk, distributed
from common.cli import UserError, reason
from common.disk import write_text
from common.distributed import say
from weights import checkpoint, generator_file

LOCK = ".lock"  # in checkpoints/: a file that a run keeps locked


def written(what):
    """Decorates a method that writes: only the main rank calls it, and an OSError does not end the run. The error is
    reported, once until the method succeeds again.
    """

    def decorate(method):
        @functools.wraps(method)
        def by_main(self, *args):
            if not distributed.is_main():
                return
            try:
                method(self, *args)
                self.unwritten.discard(what)
            except OSError as error:
                if what not in self.unwritten:
                    where = error.filename or self.path
                    say(
                        f"note: {what} could not be written ({reason(error)}) and is tried again later; the last good "
                        f"checkpoint: {self.last_good or 'none'}; make room, or see what is in the way, at {where}"
                    )
                self.unwritten.add(what)

        return by_main

    return decorate


class RunFolder:
    """config.json, metrics.jsonl, samples/, checkpoints/ and generator_ema.safetensors. Others write reference.pt and
    clip.safetensors. No other file is touched.

    identity: the options that a run keeps to its end, {name: value}. A run is resumed only if each is as it was given
    then; a path is compared as a text. If data moved, a link in the old place leads to them. Ranks, workers and
    micro-batches may change; then a resumed run is no longer bit-identical to an uninterrupted one.
    """

    def __init__(self, path, identity):
        self.path, self.identity = path, identity
        self.checkpoints = path / "checkpoints"
        self.generator = path / generator_file.FILE
        self.last_good = None  # the newest checkpoint that is known to be whole
        self.saved_step = None
        self.lock_file = None
        self.unwritten = set()  # what could not be written, and was reported

    def state(self):
        """→ the state to resume from, on every rank; None for a new run.

        Only the main rank compares a checkpoint with its digest. Raises UserError if the folder, the checkpoint and the
        run do not fit together.
        """
        with distributed.together():
            path, state = self.find() if distributed.is_main() else (None, None)
        self.last_good = distributed.broadcast(path)
        with distributed.together():
            return checkpoint.load(self.last_good, verify=False) if self.last_good and not state else state

    def find(self):
        """→ the path of the checkpoint to resume from, and its state; (None, None) for a new run."""
        clip = self.identity.get("clip")
        if clip == "judge" or (clip and os.path.realpath(clip) == os.path.realpath(BUILT_IN["judge"])):
            raise UserError("--clip judge is for evaluation, which would then favour this run; take another, or emoji")
        own = checkpoint.checkpoints(self.checkpoints)
        for name in ("config.json", "metrics.jsonl", generator_file.FILE, "reference.pt", "samples/step_*"):
            if not own and any(self.path.glob(name)):  # a run writes its first checkpoint before these
                raise UserError(f"{self.path} has {name} and no checkpoint to resume from; give another --out")
        try:
            for folder in (self.checkpoints, self.path / "samples"):
                folder.mkdir(parents=True, exist_ok=True)
            self.lock()
            for folder in (self.path, self.path / "samples", self.checkpoints):
                disk.delete_unfinished(folder)
        except OSError as error:
            raise UserError(f"--out {self.path} cannot be written: {reason(error)}") from error
        path, state = checkpoint.newest(self.checkpoints)
        if state:
            self.compare(path, state)
            self.saved_step = state["progress"]["step"]
            self.write_generator(path)  # the run may have been killed before it did
        return path, state

    def lock(self):
        """Keeps other runs out of this folder while this process lives. Raises UserError and OSError."""
        self.lock_file = (self.checkpoints / LOCK).open("a")
        try:
            # The lock is of this process alone: data workers may outlive it by seconds.
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"another run is writing to {self.path}; wait for it, or give another --out") from error
        except OSError:
            say(f"note: the disk of {self.path} has no locks, so a second run in it would not be noticed")

    def compare(self, path, state):
        """Raises UserError if a checkpoint has another identity."""
        then = state["identity"]
        if then.get("system") != self.identity.get("system"):
            raise UserError(f"the run in {path} is not of this command; give another --out")
        if changed := [name for name, now in self.identity.items() if then.get(name) != now]:
            given = [f"no --{k}" if then.get(k) is None else f"--{k} {shlex.quote(str(then[k]))}" for k in changed]
            raise UserError(
                f"the run in {path} was started with {', '.join(given)}; repeat that, or give another --out"
            )

    @written("config.json")
    def write_config(self, config):
        config |= self.identity | {"world_size": distributed.world_size(), "torch": torch.__version__}
        content = json.dumps(config, indent=2, default=str) + "\n"
        write_text(self.path / "config.json", content)

    @written("metrics.jsonl")
    def open_log(self, step):
        """Leaves out the lines of steps after `step`, which come again."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
        kept = "".join(line + "\n" for line in lines if step_of(line) <= step)
        write_text(path, kept)

    @written("metrics.jsonl")
    def log(self, row):
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @written("a picture of samples")
    def write_picture(self, picture, step):
        """Writes a grid of samples."""
        path = self.path / "samples" / f"step_{step:07d}.png"
        disk.atomically(path, lambda temporary: picture.save(temporary, "PNG"))

    @written("a checkpoint")
    def save(self, step, state, generator, keep):
        """Writes a checkpoint, unless this step has one, and the generator's file; keeps the last `keep` checkpoints.

        state: what a run needs to resume. generator: tensors and metadata, see generator_file.content.
        """
        if step != self.saved_step:
            state = {"identity": self.identity, **state}
            self.last_good = checkpoint.save(self.checkpoints, step, state, generator, keep)
            self.saved_step = step
            self.write_generator(self.last_good)

    @written("generator_ema.safetensors")
    def write_generator(self, path):
        """Copies the generator's file of a checkpoint into this folder."""
        source = path / generator_file.FILE
        disk.atomically(self.generator, lambda temporary: shutil.copyfile(source, temporary))


def step_of(line):
    """The step of a line of metrics.jsonl; infinity if the line was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
