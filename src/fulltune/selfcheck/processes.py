"""Do two processes that are started as a run's are talk to each other? Each is `python -m` this module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta

import torch

from fulltune.selfcheck.checks import Device, NotHere, Outcome
from fulltune.train.parent import ranks, spawn

SECONDS = 60.0


def all_reduce(device: Device) -> Outcome:
    """Two processes, started as a run with `num_processes: 2` is, add up a tensor."""
    if device.type == "mps":
        raise NotHere("torch has no communication for mps")
    if device.type == "cuda" and device.count < 2:
        raise NotHere("needs two GPUs, there is one")
    module = "fulltune.selfcheck.processes"
    child = subprocess.Popen(
        [sys.executable, "-m", spawn.LAUNCHER, *ranks.ONE_MACHINE, "--nproc-per-node=2", "-m", module, device.type],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        # Safe path: a file in the user's folder must not stand in for a library.
        env={**os.environ, **spawn.on_loopback(), "PYTHONSAFEPATH": "1"},
    )
    try:
        out, err = child.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        child.terminate()  # torchrun ends its workers then
        child.communicate()
        return False, f"no answer within {SECONDS:g} seconds"
    answers = [line for line in out.splitlines() if line.startswith("[")]
    if child.returncode != 0 or not answers:
        said = [line for line in err.splitlines() if "Error" in line] or err.splitlines() or ["nothing was written"]
        raise RuntimeError(f"ended with code {child.returncode}: {said[-1]}")
    found, expected = json.loads(answers[-1])
    return (found == expected, f"sum {found:g}, expected {expected:g}")


def add_up(device: str) -> tuple[float, float] | None:
    """In each process: the sum of the ranks' numbers and what it has to be; only the first rank answers."""
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Half of the parent's patience: a worker that waits for nothing ends by itself.
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=SECONDS / 2))
    rank, size = dist.get_rank(), dist.get_world_size()
    numbers = torch.full((1000,), rank + 1.0, device=device)
    dist.all_reduce(numbers)
    answer = float(numbers.sum()), 1000.0 * size * (size + 1) / 2
    dist.destroy_process_group()
    return answer if rank == 0 else None


if __name__ == "__main__" and (answer := add_up(sys.argv[1])):
    print(json.dumps(answer), flush=True)
