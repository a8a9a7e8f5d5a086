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

from tests import figures
from tests.training.runs import identical, log_of, state_of
from weights import checkpoint

ROOT = Path(__file__).parent.parent.parent
START = 600  # seconds that a life may take to make its first step, on a machine that others use too
STEPS = 5  # that a life may make after its first before it is killed, roughly; every other one ends with a checkpoint


def command(ranks, out, steps, preset="tiny"):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    options = f"--data {out.parent / 'figures'} --clip emoji --device cpu --batch 8 --save-every 2 --sample-every 1000"
    options += f" --preset {preset} --steps {steps} --out {out}"
    return [sys.executable, *launcher, "-m", "tests.figures", *options.split()]


def last_row(out):
    """The last line of the log; a step of 0 if a kill cut it off, or if there is no log."""
    try:
        return log_of(out)[-1]
    except (OSError, ValueError, IndexError):
        return {"step": 0, "seconds": 0}


def last_step(out):
    return last_row(out)["step"]


def kill(out):
    """Kills every process whose command line names the run's folder: launcher, ranks and data workers."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(out) in (process / "cmdline").read_text() and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue


def finish(*run):
    done = subprocess.run(command(*run), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the run in {run[1]} failed:\n{done.stdout}\n{done.stderr}")


def torture(ranks, kills, steps, folder, preset="tiny", seed=0):
    moments = random.Random(seed)
    whole, out = folder / "whole", folder / "tortured"
    figures.write(folder / "figures")
    finish(ranks, whole, steps, preset)
    with (folder / "output.txt").open("w") as output:
        for _ in tqdm(range(kills), desc=f"{ranks} rank(s)", unit="kill"):
            newest, log = checkpoint.checkpoints(out / "checkpoints"), out / "metrics.jsonl"
            begun, former = int(newest[0].name[:8]) if newest else 0, log.stat().st_ino if log.exists() else None
            life = subprocess.Popen(command(ranks, out, steps, preset), cwd=ROOT, stdout=output, stderr=output)
            deadline = time.monotonic() + START
            # A life rewrites the log, without the steps after the last checkpoint.
            while not log.exists() or log.stat().st_ino == former or last_step(out) <= begun:
                if (ended := life.poll() is not None) or time.monotonic() > deadline:
                    kill(out)
                    what = "ended by itself" if ended else f"made no step in {START} s"
                    sys.exit(f"a life {what}, at step {last_step(out)}:\n{Path(output.name).read_text()[-2000:]}")
                time.sleep(0.01)
            time.sleep(moments.uniform(0, STEPS * last_row(out)["seconds"]))
            kill(out)
            life.wait()
    if last_step(out) >= steps:
        sys.exit("it was done before all kills were made; take more --steps")
    finish(ranks, out, steps, preset)
    if not identical(state_of(whole), state_of(out)):
        sys.exit(f"the states differ: {whole} and {out}")
    if last_step(out) != steps or (out / "metrics.jsonl").read_text().count("\n") != steps:
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
