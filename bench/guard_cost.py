"""The share of a training step that the guard takes.

Two whole versions differ by more from run to run than a guard could cost. So its parts are timed where they are called:
the judgement (with the one wait for the device) and the update meter. On a CPU nothing runs beside them. Real weights
(MiniLM-L6) on Banking77, and a random BERT of two layers, whose steps are the shortest there are.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from bench.clean_steps import KINDS, prepared
from bench.results import Figure
from bench.runs import SMOKE, Records, fresh, script
from tests.train.runs import in_this_process

from fulltune import api, load_recipe, pipeline
from fulltune.train.loop.callbacks import UpdateMeter
from fulltune.train.loop.trainer import FullTrainer

PARTS = ((FullTrainer, "_judge_step"), (UpdateMeter, "on_step_begin"), (UpdateMeter, "on_step_end"))
BARS = {"classes-minilm": 0.01, "classes-bert": 0.03}


def timed(owner: type, name: str, seconds: dict[str, float]) -> Any:
    """Patch a method by one that counts its seconds."""
    real: Callable[..., Any] = getattr(owner, name)

    def counting(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return real(*arguments, **named)
        finally:
            seconds[name] += time.perf_counter() - began

    return mock.patch.object(owner, name, counting)


def share(folder: Path, name: str, steps: int) -> float:
    """The guard's share of a training in this process."""
    place = prepared(folder, name, KINDS[name])
    values = {"max_steps": steps, "eval_steps": steps, "eval_strategy": "steps", "logging_steps": 10, "device": "cpu"}
    values |= {"global_batch_size": KINDS[name].batch}
    changes = ["method.learning_rate=2e-4", *(f"train.{key}={value}" for key, value in values.items())]
    recipe = load_recipe(place / "recipe.yaml", changes)
    job = api.job(recipe, run_folder=fresh(place / "run"), listener=lambda event: None)
    seconds = defaultdict[str, float](float)
    with ExitStack() as patches:
        patches.enter_context(in_this_process())
        for owner, method in (*PARTS, (FullTrainer, "_run_epoch")):
            patches.enter_context(timed(owner, method, seconds))
        pipeline.run(job, "train")
    training = seconds.pop("_run_epoch")
    return sum(seconds.values()) / training


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    records, steps = Records(folder / "shares.jsonl"), 4 if SMOKE else 40 if quick else 150
    for name, bar in BARS.items():
        title = {"classes-minilm": "MiniLM-L6", "classes-bert": "a random BERT of two layers"}[name]
        taken = records.get(name, share, folder, name, steps)
        yield Figure(f"share of a training step that the guard takes, {title}", taken, "share", at_most=bar)


if __name__ == "__main__":
    script(measure, __doc__)
