"""A run on two machines, one of which dies and comes back: two network namespaces, connected by a virtual cable.

    sudo python -m tests.training.two_machines

Each machine runs torchrun's agent, as README describes for several nodes. Everything on the second is killed with −9 in
the middle of training, and its command is given again. The run must end bit-identical to one on a single machine.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import figures
from tests.training.runs import identical, state_of
from tests.training.torture import ROOT, command, finish, last_step

STEPS = 120
ADDRESSES = {"aurora-a": "10.77.0.1", "aurora-b": "10.77.0.2"}


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def connect():
    for name in ADDRESSES:
        ip("netns", "add", name)
    first, second = ADDRESSES
    ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
    for name, address in ADDRESSES.items():
        ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
        for device in ("cable", "lo"):
            ip("-n", name, "link", "set", device, "up")


def kill(name):
    for process in ip("netns", "pids", name).split():
        os.kill(int(process), signal.SIGKILL)


def start(name, out, output):
    agent = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "5", "--local-addr", ADDRESSES[name]]
    agent += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES['aurora-a']}:29500", "--rdzv-id", "aurora"]
    agent += ["--rdzv-conf", f"is_host={int(name == 'aurora-a')}"]
    launcher = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *agent]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
    # Without this, a machine that comes back does not get the first one's address (seen with PyTorch 2.14).
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    training = command(1, out, STEPS)[1:]
    return subprocess.Popen([*launcher, *training], cwd=ROOT, env=environment, stdout=output, stderr=output)


def wait_for_step(step, out, agents):
    while last_step(out) < step:
        if any(agent.poll() is not None for agent in agents):
            sys.exit(f"an agent ended by itself, at step {last_step(out)}")
        time.sleep(0.05)


def main():
    with tempfile.TemporaryDirectory() as folder:
        whole, out = Path(folder) / "whole", Path(folder) / "two"
        figures.write(Path(folder) / "figures")
        finish(2, whole, STEPS)
        connect()
        try:
            with open("/tmp/two_machines.log", "w") as output:
                first, second = (start(name, out, output) for name in ADDRESSES)
                wait_for_step(30, out, (first, second))
                kill("aurora-b")
                second.wait()
                print(f"the second machine died at step {last_step(out)}")
                time.sleep(5)
                second = start("aurora-b", out, output)
                codes = first.wait(), second.wait()
        finally:
            for name in ADDRESSES:
                kill(name)
                ip("netns", "delete", name)
        states = state_of(whole), state_of(out)
        print(f"both agents ended, with {codes}, at step {last_step(out)}; equal bit by bit: {identical(*states)}")
        sys.exit(codes != (0, 0) or not identical(*states))


if __name__ == "__main__":
    main()
