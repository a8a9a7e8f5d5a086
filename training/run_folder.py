"""The folder of a run: its checkpoints, its log, its pictures, its generator. The main rank writes it, for all."""

import functools
import json
import math
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none, so that nothing keeps a second run out there
    fcntl = None

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from clip import BUILT_IN
from common import disk, distributed
from common.cli import UserError, reason
from common.distributed import say
from data.sources import NAMES, SHARD_SUFFIXES
from weights import checkpoint, generator_file

MAY_MOVE = {"data": NAMES, "clip": BUILT_IN}  # options that name files, and what of them names none


def written(what):
    """Makes a method one that the main rank alone calls, and that a full disk does not stop: it says so, once until the
    method succeeds again, and goes on.
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
    """config.json, metrics.jsonl, samples/, checkpoints/ and generator_ema.safetensors; and tensorboard/, if wanted.

    identity: {option: value} that a run keeps to its end; with other values it is not resumed. sharing: {option: value}
    of how the work is divided, as workers; with other values it is resumed, and says so. Only files with the names
    above are ever touched.
    """

    def __init__(self, path, identity, with_board=False, sharing=None):
        self.path, self.identity, self.with_board = path, resolved(identity), with_board
        self.sharing = {**(sharing or {}), "ranks": distributed.world_size()}
        self.checkpoints = path / "checkpoints"
        self.generator = path / generator_file.FILE
        self.last_good = None  # the newest checkpoint that is known to be whole
        self.saved_step = None
        self.log_file = self.board = self.lock_file = None
        self.unwritten = set()  # what could not be written, and has been told
        self.writer, self.writing = ThreadPoolExecutor(1), None

    # ------------------------------------------------------------------------------------------------------------------
    # As a run starts.

    def state(self, resume):
        """The state that a run goes on from, on every rank, or None for a new run. resume: as --resume.

        The main rank alone holds a checkpoint against its digest. Raises UserError where the folder, the checkpoint and
        the run do not go together.
        """
        with distributed.together():
            path, state = self.find(resume) if distributed.is_main() else (None, None)
        self.last_good = distributed.broadcast(path)
        with distributed.together():
            return checkpoint.load(self.last_good, verify=False) if self.last_good and not state else state

    def find(self, resume):
        """→ the path of the checkpoint to go on from, and its state; or None and None."""
        try:
            for folder in (self.checkpoints, self.path / "samples"):
                folder.mkdir(parents=True, exist_ok=True)
            self.lock()
        except OSError as error:
            raise UserError(f"--out {self.path} cannot be written: {reason(error)}") from error
        held = checkpoint.checkpoints(self.checkpoints)
        for name in ("config.json", "metrics.jsonl", generator_file.FILE):
            if not held and (self.path / name).exists():  # a run's first checkpoint is there before these
                raise UserError(f"{self.path} holds a {name}, and no checkpoint to go on from; give another --out")
        if resume in ("auto", "moved"):
            path, state = checkpoint.newest(self.checkpoints)
        elif held:
            raise UserError(f"--resume {resume}, but {self.path} holds a run of its own; give another --out")
        elif resume == "no":
            path, state = None, None
        elif not Path(resume).is_dir():
            raise UserError(f"--resume {resume}: no such checkpoint; use auto to go on in --out, or no to start afresh")
        else:
            path, state = Path(resume), checkpoint.load(resume)
        if state:
            self.compare(path, state, MAY_MOVE if resume == "moved" else ())
        if path in held:
            self.saved_step = state["progress"]["step"]
            self.write_generator(path)  # a run may have been killed before it did
        return path, state

    def lock(self):
        """Keeps other runs out of this folder for as long as this process lives. Raises UserError, OSError."""
        self.lock_file = (self.checkpoints / ".lock").open("a")
        if fcntl is None:
            return
        try:
            # Of the process alone: data workers that outlive it by some seconds hold no such lock.
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"another run is writing to {self.path}; wait for it, or give another --out") from error
        except OSError:
            say(f"note: the disk of {self.path} has no locks, so a second run there would not be noticed")

    def compare(self, path, state, but=()):
        """A checkpoint's identity must be this run's, but for some options. Raises UserError; says where the work is
        shared otherwise.
        """
        then = state["identity"]
        if then.get("system") != self.identity.get("system"):
            raise UserError(f"the run in {path} is not of this command; give another --out")
        changed = [name for name, now in self.identity.items() if then.get(name) != now and name not in but]
        if changed:
            options = ", ".join(f"--{name} {shlex.quote(str(then.get(name)))}" for name in changed)
            moved = "; if these files only moved, give --resume moved" if set(changed) <= MAY_MOVE.keys() else ""
            raise UserError(f"the run in {path} was started with {options}; repeat that, or give another --out{moved}")
        then = state.get("sharing", {})
        if changed := [name for name in then if name in self.sharing and then[name] != self.sharing[name]]:
            changes = ", ".join(f"{name} {self.sharing[name]} instead of {then[name]}" for name in changed)
            say(
                f"note: the run goes on with {changes}; on these depend rounding, the order of shards and which wrong "
                "captions are compared, so it is no longer equal, bit by bit, to one that was not stopped"
            )

    # ------------------------------------------------------------------------------------------------------------------
    # While it runs.

    @written("config.json")
    def write_config(self, config):
        config |= self.identity | {"world_size": distributed.world_size(), "torch": torch.__version__}
        content = json.dumps(config, indent=2, default=str) + "\n"
        disk.write_text(self.path / "config.json", content)

    @written("metrics.jsonl")
    def open_log(self, step):
        """Opens the log, without the lines of steps after `step`, which are about to be made again."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
        kept = "".join(line + "\n" for line in lines if step_of(line) <= step)
        disk.write_text(path, kept)
        self.log_file = path.open("a", encoding="utf-8")
        if self.with_board:
            from torch.utils.tensorboard import SummaryWriter  # here, as it takes a second to import

            self.board = SummaryWriter(self.path / "tensorboard", purge_step=step + 1)

    @written("metrics.jsonl")
    def log(self, row):
        if self.log_file is None:  # the disk was full when the run began
            self.log_file = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self.log_file.write(json.dumps(row) + "\n")
        self.log_file.flush()
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, row["step"])

    @written("a picture of samples")
    def write_picture(self, picture, loads, step):
        """A grid of samples, and what share of their points each expert took, {router: [E]}."""
        path = self.path / "samples" / f"step_{step:07d}.png"
        disk.atomically(path, lambda temporary: picture.save(temporary, "PNG"))
        if self.board:
            self.board.add_image("samples", np.asarray(picture), step, dataformats="HWC")
            for router, shares in loads.items():
                for expert, share in enumerate(shares.tolist()):
                    self.board.add_scalar(f"experts/{router}, share of expert {expert}", share, step)
            self.board.flush()

    def save(self, step, state, generator, keep):
        """Writes a checkpoint, if this step has none, and the generator's file; the last `keep` checkpoints stay.

        state: all that a run needs to go on. generator: tensors and metadata, see generator_file.content.
        A thread writes a copy, while the run goes on. A save waits for the one before.
        """
        self.wait()
        if distributed.is_main() and step != self.saved_step:
            state = {"identity": self.identity, "sharing": self.sharing, **state}
            self.writing = self.writer.submit(self.write, step, *on_host((state, generator)), keep)

    def wait(self):
        """Until the last checkpoint is on the disk, or it was told that it could not be written."""
        if self.writing:
            self.writing.result()

    @written("a checkpoint")
    def write(self, step, state, generator, keep):
        self.last_good = checkpoint.save(self.checkpoints, step, state, generator, keep)
        self.saved_step = step
        self.write_generator(self.last_good)

    @written("generator_ema.safetensors")
    def write_generator(self, path):
        """Gives the generator's file of a checkpoint its name in this folder."""
        disk.link(path / generator_file.FILE, self.generator)


def on_host(state):
    """A copy of nested dicts and lists, its tensors in the memory of the CPU: pinned, where they come from a GPU."""
    copy = tree_map_only(torch.Tensor, host_copy, state)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copy


def host_copy(x):
    if not x.is_cuda:
        return x.detach().clone()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x.detach(), non_blocking=True)


def step_of(line):
    """The step of a line of metrics.jsonl; 0 for one that a run did not write, infinity for one that was cut off."""
    try:
        step = json.loads(line)["step"]
        return step if isinstance(step, int) else 0
    except (ValueError, KeyError, TypeError):
        return math.inf if line.startswith("{") and not line.endswith("}") else 0


def resolved(identity):
    """An identity in which --data and --clip name the same files by the same path, whatever folder it is read from."""
    found = dict(identity)
    for option, names in MAY_MOVE.items():
        if option in identity and identity[option] not in names:
            found[option] = absolute(identity[option])
    return found


def absolute(spec):
    """A path → itself from the root, without links; anything else, as MODEL:WEIGHTS or a URL → itself."""
    if "://" in spec or spec.startswith("pipe:"):
        return spec
    is_path = os.path.exists(spec) or spec.endswith(SHARD_SUFFIXES)  # a pattern of shards is no file
    return os.path.realpath(spec) if is_path else spec
