"""The folder of a run: checkpoints, log, pictures and generator. The main rank writes it for all."""

import atexit
import contextlib
import functools
import json
import math
import os
import shlex
from concurrent.futures import ThreadPoolExecutor

try:
    import fcntl
except ImportError:  # Windows has no fcntl; there, nothing prevents a second run in the folder
    fcntl = None

import torch
from torch.utils._pytree import tree_map_only

from clip import BUILT_IN
from common import disk, distributed
from common.cli import UserError, make_folder, reason
from common.disk import write_text
from common.distributed import say
from data.sources import NAMES
from weights import checkpoint, generator_file

LOCK = ".lock"  # in checkpoints/: a file that a run keeps locked
# Options that name files, {option: values that are no files}.
MAY_MOVE = {"data": NAMES, "clip": (*BUILT_IN, "train")}


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
    """config.json, metrics.jsonl, samples/, checkpoints/ and generator_ema.safetensors. No other file is touched.

    identity: the options that a run keeps to its end, {name: value}; with other values it is not resumed. sharing: the
    options that divide the work, for example workers; with other values it is resumed, with a note.
    """

    def __init__(self, path, identity, sharing=None):
        self.path, self.identity = path, resolved(identity)
        self.sharing = {**(sharing or {}), "ranks": distributed.world_size()}
        self.checkpoints = path / "checkpoints"
        self.generator = path / generator_file.FILE
        self.last_good = None  # the newest checkpoint that is known to be whole
        self.saved_step = None
        self.log_file = self.lock_file = None
        self.unwritten = set()  # what could not be written, and was reported
        self.writer, self.writing = ThreadPoolExecutor(1), None

    # ------------------------------------------------------------------------------------------------------------------
    # As a run starts.

    def state(self, moved=False):
        """→ the state to resume from, on every rank; None for a new run. moved: the files of MAY_MOVE may be elsewhere.

        Only the main rank compares a checkpoint with its digest. Raises UserError if the folder, the checkpoint and the
        run do not fit together.
        """
        with distributed.together():
            path, state = self.find(moved) if distributed.is_main() else (None, None)
        self.last_good = distributed.broadcast(path)
        with distributed.together():
            return checkpoint.load(self.last_good, verify=False) if self.last_good and not state else state

    def find(self, moved):
        """→ the path of the checkpoint to resume from, and its state; (None, None) for a new run."""
        if self.identity.get("clip") in ("judge", os.path.realpath(BUILT_IN["judge"])):
            raise UserError("--clip judge is for evaluation, which would then favour this run; take another, or emoji")
        for name in ("config.json", "metrics.jsonl", generator_file.FILE, "reference.pt", "clip.safetensors"):
            if (self.path / name).is_dir():
                raise UserError(f"{self.path / name} is a folder, and a run writes a file there; move the folder")
        own = checkpoint.checkpoints(self.checkpoints)
        for name in ("config.json", "metrics.jsonl", generator_file.FILE, "reference.pt", "samples/step_*"):
            if not own and any(self.path.glob(name)):  # a run writes its first checkpoint before these
                raise UserError(f"{self.path} has {name} and no checkpoint to resume from; give another --out")
        if moved and not own:
            raise UserError(f"--resume moved: {self.path} has no checkpoint; give the --out of the run")
        folders = self.path, self.checkpoints, self.path / "samples"
        try:
            for folder in folders:
                make_folder(folder)
            self.lock()
            disk.delete_unfinished(self.path)
        except OSError as error:
            raise UserError(f"--out {self.path} cannot be written: {reason(error)}") from error
        path, state = checkpoint.newest(self.checkpoints)
        if state:
            self.compare(path, state, moved)
            self.saved_step = state["progress"]["step"]
            self.write_generator(path)  # the run may have been killed before it did
        return path, state

    def lock(self):
        """Keeps other runs out of this folder while this process lives. Raises UserError and OSError."""
        self.lock_file = (self.checkpoints / LOCK).open("a")
        atexit.register(remove_lock, self.checkpoints)
        if fcntl is None:
            return
        try:
            # The lock is of this process alone: data workers may outlive it by seconds.
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"another run is writing to {self.path}; wait for it, or give another --out") from error
        except OSError:
            say(f"note: the disk of {self.path} has no locks, so a second run in it would not be noticed")

    def compare(self, path, state, moved):
        """Compares a checkpoint's identity and sharing with this run's. Raises UserError for an identity that differs,
        except in the names of files if these moved; prints a note for a sharing that differs.
        """
        then = state["identity"]
        if then.get("system") != self.identity.get("system"):
            raise UserError(f"the run in {path} is not of this command; give another --out")
        changed = {name: {then.get(name), now} for name, now in self.identity.items() if then.get(name) != now}
        files = {name for name, values in changed.items() if name in MAY_MOVE and not values & set(MAY_MOVE[name])}
        for name in files if moved else ():
            del changed[name]
        if changed:
            given = [(name, then.get(name)) for name in changed]
            options = ", ".join(f"no --{k}" if v is None else f"--{k} {shlex.quote(str(v))}" for k, v in given)
            may_move = changed.keys() == files and "system" not in self.identity  # a baseline has no --resume
            advice = "; if these files only moved, give --resume moved" if may_move else ""
            raise UserError(f"the run in {path} was started with {options}; repeat that, or give another --out{advice}")
        then = state.get("sharing", {})
        if changed := [name for name in then if name in self.sharing and then[name] != self.sharing[name]]:
            changes = ", ".join(f"{name} {self.sharing[name]} instead of {then[name]}" for name in changed)
            say(
                f"note: the run resumes with {changes}; these change rounding, the order of shards and which wrong "
                "captions are compared, so it is no longer bit-identical to an uninterrupted run"
            )

    # ------------------------------------------------------------------------------------------------------------------
    # While it runs.

    @written("config.json")
    def write_config(self, config):
        config |= self.identity | {"world_size": distributed.world_size(), "torch": torch.__version__}
        content = json.dumps(config, indent=2, default=str) + "\n"
        write_text(self.path / "config.json", content)

    @written("metrics.jsonl")
    def open_log(self, step):
        """Opens the log, without the lines of steps after `step`, which come again."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
        kept = "".join(line + "\n" for line in lines if step_of(line) <= step)
        write_text(path, kept)
        self.log_file = path.open("a", encoding="utf-8")

    @written("metrics.jsonl")
    def log(self, row):
        if self.log_file is None:  # the disk was full when the run began
            self.log_file = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self.log_file.write(json.dumps(row) + "\n")
        self.log_file.flush()

    @written("a picture of samples")
    def write_picture(self, picture, step):
        """Writes a grid of samples."""
        path = self.path / "samples" / f"step_{step:07d}.png"
        disk.atomically(path, lambda temporary: picture.save(temporary, "PNG"))

    def save(self, step, state, generator, keep):
        """Writes a checkpoint, unless this step has one, and the generator's file; keeps the last `keep` checkpoints.

        state: what a run needs to resume. generator: tensors and metadata, see generator_file.content. A thread writes
        a copy while the run goes on; the next save waits for it.
        """
        self.wait()
        if distributed.is_main() and step != self.saved_step:
            state = {"identity": self.identity, "sharing": self.sharing, **state}
            self.writing = self.writer.submit(self.write, step, *on_host((state, generator)), keep)

    def wait(self):
        """Waits until the last checkpoint is on the disk, or its error is reported."""
        if self.writing:
            self.writing.result()

    @written("a checkpoint")
    def write(self, step, state, generator, keep):
        self.last_good = checkpoint.save(self.checkpoints, step, state, generator, keep)
        self.saved_step = step
        self.write_generator(self.last_good)

    @written("generator_ema.safetensors")
    def write_generator(self, path):
        """Links the generator's file of a checkpoint into this folder."""
        disk.link(path / generator_file.FILE, self.generator)


def remove_lock(checkpoints):
    """Deletes the lock's file if it is alone, so that make_folder can delete the folder."""
    with contextlib.suppress(OSError):
        if [path.name for path in checkpoints.iterdir()] == [LOCK]:
            (checkpoints / LOCK).unlink()


def on_host(state):
    """A copy of nested dicts and lists, with tensors in the CPU's memory; pinned memory if they come from a GPU."""
    copy = tree_map_only(torch.Tensor, host_copy, state)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copy


def host_copy(x):
    if not x.is_cuda:
        return x.detach().clone()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x.detach(), non_blocking=True)


def step_of(line):
    """The step of a line of metrics.jsonl; 0 if no run wrote the line, infinity if it was cut off."""
    try:
        step = json.loads(line)["step"]
        return step if isinstance(step, int) else 0
    except (ValueError, KeyError, TypeError):
        return math.inf if line.startswith("{") and not line.endswith("}") else 0


def resolved(identity):
    """The identity with absolute paths in --data and --clip, so that it is the same from any working directory. URLs,
    commands and models of open_clip (MODEL:WEIGHTS) stay as they are.
    """
    found = dict(identity)
    for option, names in MAY_MOVE.items():
        spec = identity.get(option)
        if spec is None or spec in names or "://" in spec or spec.startswith("pipe:"):
            continue
        if os.path.exists(spec) or option == "data" or ":" not in spec:
            found[option] = os.path.realpath(spec)
    return found
