"""What the run guard costs: the seconds in its own code, as a share of the training steps of the same run, and the
bytes that it holds while a step is judged, as a share of weights, gradients and moments.

    FULLTUNE_BENCH_DATA=... python bench/guard_cost.py FOLDER [--steps 150] [--kinds classes-minilm]

Two whole versions differ by more from run to run than a guard could cost. So its parts are timed where they are called:
the states of the random numbers before a step, the judgement (with the one wait for the device) and the update meter.
On a CPU nothing runs beside them. Real weights (MiniLM-L6) on Banking77, and a random BERT of two layers, whose steps
are the shortest there are.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from clean_steps import KINDS, prepared
from tests.train.runs import in_this_process

from fulltune import api, load_recipe, pipeline
from fulltune.train.loop.callbacks import UpdateMeter
from fulltune.train.loop.trainer import FullTrainer

PARTS = (
    (FullTrainer, "_judge"),
    (UpdateMeter, "on_step_begin"),
    (UpdateMeter, "on_step_end"),
)


def held(trainer: FullTrainer, meter: UpdateMeter | None) -> int:
    """Bytes that are kept for the guard: micro batches, what it remembers, and sampled weights."""
    tensors = [one for batch in trainer.batches for one in batch.values()]
    tensors += list(meter._before.values()) if meter else []
    states = [asdict(trainer.guard_history), *(dict(part.state()) for part in trainer.parts)]
    remembered = sum(sys.getsizeof(pickle.dumps(state)) for state in states)
    return remembered + sum(one.nbytes for one in tensors if isinstance(one, torch.Tensor))


def timed(of: Any, name: str, seconds: Counter[str], look: Callable[[Any], None] = lambda of: None) -> Any:
    """Patch a function by one that counts its seconds; before it, its first argument is looked at."""
    real: Callable[..., Any] = getattr(of, name)

    def counting(*given: Any, **named: Any) -> Any:
        look(given[0])
        began = time.perf_counter()
        try:
            return real(*given, **named)
        finally:
            seconds[name] += time.perf_counter() - began

    return mock.patch.object(of, name, counting)


def measure(folder: Path, kind: str, steps: int) -> None:
    place = prepared(folder, kind)
    chosen = [f"train.max_steps={steps}", "train.device=cpu", "method.learning_rate=2e-4", "train.logging_steps=10"]
    chosen += [f"train.global_batch_size={KINDS[kind].batch}", "train.eval_strategy=steps", f"train.eval_steps={steps}"]
    job = api.job(
        load_recipe(place / "recipe.yaml", chosen), run_folder=folder / f"cost-{kind}", listener=lambda event: None
    )
    seconds: Counter[str] = Counter()
    most, state, meters = 0, 0, list[UpdateMeter]()

    def weigh(trainer: Any) -> None:
        nonlocal most, state
        most = max(most, held(trainer, meters[-1] if meters else None))
        state = 4 * sum(one.nbytes for one in trainer.model.parameters())

    looks = {"_judge": weigh, "on_step_begin": meters.append}
    with ExitStack() as patches:
        patches.enter_context(in_this_process())
        for of, name in PARTS:
            patches.enter_context(timed(of, name, seconds, looks.get(name, lambda of: None)))
        patches.enter_context(timed(FullTrainer, "_run_epoch", seconds))
        pipeline.run(job, "train")
    whole = seconds.pop("_run_epoch")
    share = sum(seconds.values()) / whole
    parts = ", ".join(f"{name} {1e6 * value / steps:.0f} us" for name, value in seconds.items())
    print(f"{kind}: {1e3 * whole / steps:.1f} ms a step with evaluations, of which the guard {share:.2%} ({parts})")
    size = f"{state / 2**20:,.1f} MiB of weights, gradients and moments"
    print(f"{kind}: holds {most:,} bytes, {most / state:.3%} of {size}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--kinds", nargs="+", default=["classes-minilm", "classes-bert"], choices=list(KINDS))
    given = parser.parse_args()
    for kind in given.kinds:
        measure(given.folder.absolute(), kind, given.steps)


if __name__ == "__main__":
    main()
