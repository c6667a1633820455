"""Bytes that each process sends in a training step, counted and by the plan's arithmetic, on the CPU.

    python bench/traffic.py [--folder FOLDER]

Each cell is an attempt of fulltune's worker under torchrun with gloo, of a small model of random weights. Counted is
the payload of each collective of the training steps, without the dry run and evaluations: FSDP2's at its all-gathers
and reduce-scatters, DistributedDataParallel's in a communication hook that reduces the bucket as it would be. A ring
sends (N - 1) / N of a payload for an all-gather and a reduce-scatter, twice that for an all-reduce; gloo does a
reduce-scatter as an all-reduce, which is not counted as two.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "src")]

# The benches are no installed package: they are found by the path that was set above.
from bench.memory_per_rank import STEPS, environment, write_recipe  # noqa: E402  # after what it needs
from bench.memory_prediction import TIED, _cell  # noqa: E402  # after what it needs

from fulltune.train.parent import ranks, spawn  # noqa: E402  # after what it needs

MODELS = (
    _cell("llama", "llama", (256, 4, 8000), (2, 32)),
    _cell("llama-tied", "llama", (256, 4, 8000), (2, 32), config=TIED),
    _cell("bert-accumulation", "bert", (256, 4, 8000), (2, 32), accumulation=3),
)
PLACES = (("ddp", 2), ("fsdp2", 2), ("ddp", 4), ("fsdp2", 4))


def counted(cell: Any, placement: str, processes: int, folder: Path) -> tuple[float, int]:
    """Bytes that a process sends in a step: counted, and by the plan."""
    from fulltune import api, pipeline
    from fulltune.train.request import Request

    recipe = write_recipe(cell, placement, processes, folder)
    job = api.job(recipe, run_folder=folder / "run", listener=lambda event: None)
    plan = pipeline.run(job, "plan").plan
    assert plan is not None
    request = Request(
        run_folder=str(folder / "run"), recipe=job.recipe, plan=plan, attempt=1, checkpoint=None, parent_pid=None
    )
    request.folder.mkdir(parents=True)
    request.checkpoints.mkdir(parents=True)
    request.save(folder / "request.json")
    launch = [sys.executable, "-m", spawn.LAUNCHER, *ranks.ONE_MACHINE, f"--nproc-per-node={processes}"]
    command = [*launch, __file__, "--worker", str(folder / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    found = folder / "payload.json"
    if not found.exists():
        sys.exit((done.stdout + done.stderr)[-3000:])
    payload = json.loads(found.read_text(encoding="utf-8"))
    share = (processes - 1) / processes / STEPS
    return share * (payload["all-gather"] + payload["reduce-scatter"] + 2 * payload["all-reduce"]), plan.sent_bytes


def work(file: Path) -> None:
    """The worker, with its collectives counted."""
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
    from torch.nn.parallel import DistributedDataParallel

    from fulltune.train.loop.trainer import FullTrainer
    from fulltune.train.worker import main as worker

    payload, counts = Counter(dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce"), 0)), [False]

    def count(kind: str, tensor: torch.Tensor) -> None:
        payload[kind] += tensor.nbytes * counts[0]

    def spied(kind: str, owner: Any, argument: str) -> None:
        theirs = owner.__call__

        def call(self: Any, *rest: Any, **keywords: Any) -> Any:
            count(kind, keywords.get(argument, rest[0] if rest else None))
            return theirs(self, *rest, **keywords)

        owner.__call__ = call

    spied("all-gather", collectives.DefaultAllGather, "output_tensor")
    spied("reduce-scatter", collectives.DefaultReduceScatter, "input_tensor")
    made, step = DistributedDataParallel.__init__, FullTrainer.training_step

    def make(self: Any, *rest: Any, **keywords: Any) -> None:
        made(self, *rest, **keywords)

        def hook(state: Any, bucket: Any) -> Any:
            count("all-reduce", bucket.buffer())
            return allreduce_hook(state, bucket)

        hook.__annotations__ = {"bucket": torch.distributed.GradBucket}  # the type itself is asked for, not its name
        self.register_comm_hook(None, hook)

    def training_step(self: Any, *rest: Any, **keywords: Any) -> Any:
        counts[0] = True
        try:
            return step(self, *rest, **keywords)
        finally:
            counts[0] = False

    DistributedDataParallel.__init__ = make  # type: ignore[method-assign]  # watched
    FullTrainer.training_step = training_step  # type: ignore[method-assign]  # watched
    code = worker.main(str(file))
    if code == 0 and os.environ["RANK"] == "0":
        (file.parent / "payload.json").write_text(json.dumps(payload), encoding="utf-8")
    sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fulltune-traffic")
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker is not None:
        work(chosen.worker)
    print(f"{'cell':<20}{'placement':<12}{'counted, MB':>12}{'plan, MB':>10}", flush=True)
    for cell in MODELS:
        for placement, processes in PLACES:
            sent, planned = counted(cell, placement, processes, chosen.folder)
            error = planned / sent - 1 if sent else float("nan")
            line = f"{cell.name:<20}{placement:<6}x {processes:<4}{sent / 1e6:>12,.2f}{planned / 1e6:>10,.2f}"
            print(f"{line}{error:>+9.2%}", flush=True)


if __name__ == "__main__":
    main()
