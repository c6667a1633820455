"""Measure memory: a model of random weights takes two whole steps in a process of its own.

`measured` starts `python -m bench.gpu_day.cell FOLDER JSON` and reads its answer. The process plans the run as a user's
would be planned, reads the weights, and lets fulltune's worker do its checks and its dry run: two passes and a step on
the longest rows, and an evaluation. Inside DeepSpeed, which has no dry run, it trains for two steps and is stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from bench.random_models import Cell, model_parts, write_recipe
from bench.results import ROOT

from fulltune.plan.memory import CUDA_CONTEXT_BYTES

ZERO = ("zero2", "zero3")
SEEN = ("loading", "step", "evaluation")
"""Phases of the plan that the measured process passes."""


def measured(cell: Cell, folder: Path, seconds: float, **train: Any) -> dict[str, Any]:
    """Plan and measure a cell.

    Args:
        cell: The model and how it is trained.
        folder: Made anew, and left for the log.
        seconds: After which the process is ended.
        train: Further settings of `train`.

    Returns:
        `planned_bytes`, `planned_host_bytes`; `growth_bytes` of what the plan foresees; on a GPU `allocated_bytes`,
        `reserved_bytes` and `outside_bytes`; `host_bytes`, `tokens_per_second`; or `problem`;
        or `skipped`, where the plan says that it does not fit.
    """
    settings = json.dumps({"cell": asdict(cell), "train": train})
    command = [sys.executable, "-m", "bench.gpu_day.cell", str(folder), settings]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"problem": f"not finished within {seconds:.0f} s"}
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not answers:
        print(done.stdout, done.stderr, file=sys.stderr)
        errors = done.stderr.strip().splitlines() or ["nothing was written"]
        return {"problem": f"ended with code {done.returncode}: {errors[-1]}"}
    answer: dict[str, Any] = json.loads(answers[-1])
    return answer


def save_random(cell: Cell, folder: Path) -> Path:
    """Write a model of random bf16 weights without building it: a repeated block of numbers, and vectors of ones.

    8 B parameters are 16 GB on the disk, and as many as it can write in a second.
    """
    import torch

    tokenizer, config, kind = model_parts(cell)
    tokenizer.save_pretrained(folder)
    config.architectures = [kind._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = kind.from_config(config).state_dict()
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = 0
    for name, tensor in tensors.items():
        begins, ends = ends, ends + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begins, ends]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = _bf16(np.random.default_rng(0).normal(0, 0.02, 2**23))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            left = tensor.numel()
            if tensor.dim() < 2:
                file.write(_bf16(np.ones(left)).tobytes())
                continue
            while left:
                count = min(left, len(block))
                file.write(block[:count].tobytes())
                left -= count
    return folder


def _bf16(values: Any) -> Any:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _work(folder: Path, cell: Cell, train: dict[str, Any]) -> dict[str, Any]:
    """Plan and measure a cell in this process."""
    from fulltune import api, pipeline
    from fulltune.errors import DoesNotFitError
    from fulltune.system.memory import process_peak_bytes
    from fulltune.train.hooks import Hooks
    from fulltune.train.request import Request
    from fulltune.train.worker import main as worker

    placement = train.pop("placement", "single")
    recipe, run = write_recipe(cell, placement, 1, folder, save_random, **train), folder / "run"
    job = api.job(recipe, run_folder=run, listener=lambda event: None)
    try:
        plan = pipeline.run(job, "plan").plan
    except DoesNotFitError as error:
        return {"skipped": error.problems[0]}
    assert plan is not None
    assert plan.memory is not None
    planned = max(size for phase, size in plan.memory.phases.items() if phase in SEEN)
    is_zero = placement in ZERO
    request = Request(
        run_folder=str(run),
        recipe=job.recipe,
        plan=plan,
        attempt=1,
        checkpoint=None,
        parent_pid=None,
        probe=not is_zero,
    )
    request.folder.mkdir(parents=True)
    if is_zero:
        request.checkpoints.mkdir(parents=True)
        if plan.device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
    outcome = worker.run_attempt(request, Hooks(), _stop_after(2) if is_zero else None)
    answer = {"planned_bytes": planned, "planned_host_bytes": plan.memory.host, "host_bytes": process_peak_bytes()}
    if outcome.status not in (("done", "interrupted") if is_zero else ("done",)):
        return answer | {"problem": f"{outcome.status}: {outcome.reason}"}
    speed = outcome.tokens_per_second or (outcome.forecast.tokens_per_second if outcome.forecast else None)
    growth = outcome.memory_growth_bytes if is_zero else outcome.dry_run_growth_bytes
    return answer | {"growth_bytes": growth, "tokens_per_second": speed, **_on_gpu(plan.device)}


def _stop_after(step: int) -> Any:
    from fulltune.errors import InterruptedRun
    from fulltune.records.events import Event, StepLogged

    def listener(event: Event) -> None:
        if isinstance(event, StepLogged) and event.step >= step:
            raise InterruptedRun("measured")

    return listener


def _on_gpu(device: str) -> dict[str, int]:
    """Peak bytes that torch allocated and reserved, and bytes outside of it: CUDA's context, libraries, driver."""
    if device != "cuda":
        return {}
    import torch

    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"allocated_bytes": peaks[0], "reserved_bytes": peaks[1], "outside_bytes": outside}


def against_plan(answer: dict[str, Any]) -> dict[str, float | int | None]:
    """The plan's relative error against reserved and outside memory together, and against the tensors alone."""
    if "reserved_bytes" not in answer:
        return {"planned_error": None, "planned_tensors_error": None}
    whole = answer["reserved_bytes"] + answer["outside_bytes"]
    tensors = answer["planned_bytes"] - CUDA_CONTEXT_BYTES
    return {
        "planned_error": answer["planned_bytes"] / whole - 1,
        "planned_tensors_error": tensors / answer["allocated_bytes"] - 1,
    }


if __name__ == "__main__":
    wanted = json.loads(sys.argv[2])
    print(json.dumps(_work(Path(sys.argv[1]), Cell(**wanted["cell"]), wanted["train"])), flush=True)
