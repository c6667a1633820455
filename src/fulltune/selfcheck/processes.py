"""Checks that need processes of their own: several that talk to each other, and a compiler that may hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

from fulltune.models.compiled import lacking
from fulltune.selfcheck.devices import Device, NotHere, Result
from fulltune.train.parent import ranks, spawn

CHILD = "fulltune.selfcheck.child"
COMPILE_SECONDS = 60
REDUCE_SECONDS = 60


def all_reduce(device: Device) -> Result:
    """Two processes, started as a run with `num_processes: 2` is, add up a tensor."""
    if device.type == "mps":
        raise NotHere("torch has no communication for mps")
    if device.type == "cuda" and device.count < 2:
        raise NotHere("needs two GPUs, there is one")
    launcher = ["-m", spawn.LAUNCHER, *ranks.ONE_MACHINE, "--nproc-per-node=2", "-m", CHILD]
    try:
        answer = _ask([*launcher, "all-reduce", device.type], REDUCE_SECONDS)
    except subprocess.TimeoutExpired:
        return Result(False, f"no answer within {REDUCE_SECONDS} seconds")
    return Result(answer["sum"] == answer["expected"], f"sum {answer['sum']:g}, expected {answer['expected']:g}")


def compiled(device: Device) -> Result:
    """`torch.compile` of a tiny model's block: loss and gradients as without."""
    if device.type != "mps" and (missing := lacking(device.type)):
        raise NotHere(f"no {missing}")
    try:
        answer = _ask(["-m", CHILD, "compile", device.type], COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        raise NotHere(f"compiling took more than {COMPILE_SECONDS} seconds") from None
    if "error" in answer:
        raise NotHere(f"torch.compile does not work: {answer['error']}")
    error = max(answer["loss_error"], answer["gradient_error"])
    return Result(error <= 1e-4, f"off by {error:.0e}, bound 1e-04; compiled in {answer['seconds']:.0f} s")


def _ask(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run Python, and read the JSON of its last line; compiled code goes into a folder that is deleted.

    Raises:
        subprocess.TimeoutExpired: When there was no answer in time; its processes are ended.
        RuntimeError: When it failed, with the last line it wrote.
    """
    with TemporaryDirectory(prefix="fulltune-selfcheck-", ignore_cleanup_errors=True) as cache:
        caches = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        child = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            # Safe path: a file in the user's folder must not stand in for a library.
            env={**os.environ, **spawn.on_loopback(), **caches, "PYTHONSAFEPATH": "1"},
            start_new_session=True,
        )
        try:
            out, err = child.communicate(timeout=seconds)
        finally:
            if child.poll() is None:
                _end(child)
    answers = [line for line in out.splitlines() if line.startswith("{")]
    if child.returncode != 0 or not answers:
        said = [line for line in err.splitlines() if "Error" in line] or err.splitlines() or ["nothing was written"]
        raise RuntimeError(f"ended with code {child.returncode}: {said[-1]}")
    answer: dict[str, Any] = json.loads(answers[-1])
    return answer


def _end(child: subprocess.Popen[str]) -> None:
    """End a process and those it started: torchrun's workers are in groups of their own, so it is asked first."""
    os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
