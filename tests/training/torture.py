"""Kills a run with −9 at random moments, starts it again each time, and compares it with an undisturbed run.

    python -m tests.training.torture --kills 30 --ranks 2
    python -m tests.training.torture --kills 30 --preset tiny-larger    # the second stage

Each life makes steps before it dies, and checkpoints are so frequent that many die while saving. In the end the weights
and all of the state must be bit-identical.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from tests import ROOT, figures
from tests.training.runs import identical, log_of, state_of

STEPS = 5  # that a life may make after its first new one before it is killed; every other one ends with a checkpoint


def command(ranks, out, steps, preset):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    options = f"--data {figures.folder()} --clip emoji --device cpu --batch 8 --save-every 2 --sample-every 1000"
    options += f" --preset {preset} --steps {steps} --out {out}"
    return [sys.executable, *launcher, "-m", "tests.figures", *options.split()]


def last_row(out):
    """The last line of the log; a step of 0 if a kill cut it off, or if there is no log."""
    try:
        return log_of(out)[-1]
    except (OSError, ValueError, IndexError):
        return {"step": 0}


def kill(out):
    """Kills every process whose command line names the run's folder: launcher, ranks and data workers."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(out) in (process / "cmdline").read_text() and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue


def torture(ranks, kills, steps, folder, preset="tiny"):
    whole, out, moments = folder / "whole", folder / "tortured", random.Random(0)
    subprocess.run(command(ranks, whole, steps, preset), cwd=ROOT, check=True)
    reached = 0
    for _ in tqdm(range(kills), desc=f"{ranks} rank(s)", unit="kill"):
        life = subprocess.Popen(command(ranks, out, steps, preset), cwd=ROOT, stdout=subprocess.DEVNULL)
        while last_row(out)["step"] <= reached:
            if life.poll() is not None:
                sys.exit(f"a life ended by itself, at step {last_row(out)['step']}")
            time.sleep(0.01)
        time.sleep(moments.uniform(0, STEPS * last_row(out).get("seconds", 0)))
        kill(out)
        life.wait()
        reached = max(reached, last_row(out)["step"])
    if reached >= steps:
        sys.exit("it was done before all kills were made; take more --steps")
    subprocess.run(command(ranks, out, steps, preset), cwd=ROOT, check=True)
    if not identical(state_of(whole), state_of(out)):
        sys.exit(f"the states differ: {whole} and {out}")
    if [row["step"] for row in log_of(out)] != list(range(1, steps + 1)):
        sys.exit("the log has lost or doubled steps")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--preset", choices=("tiny", "tiny-larger"), default="tiny")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torture(args.ranks, args.kills, args.steps, Path(folder), args.preset)
    print(f"{args.preset}, {args.ranks} rank(s), {args.kills} kills, {args.steps} steps: all bits equal")


if __name__ == "__main__":
    main()
