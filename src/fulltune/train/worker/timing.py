"""The forecast of a run from its dry run: further passes are timed where they cost little against the run."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from fulltune import files
from fulltune.inference.run import batches, longest_first
from fulltune.plan.time import GENERIC_TOKENS, rows_of_points, texts_read
from fulltune.records.plan import TimeNeed
from fulltune.train.worker.forecast import (
    Readings,
    Schedule,
    Shape,
    Speed,
    Timings,
    extra_seconds,
    forecast,
    quadratic_share,
    speed,
    times_between,
)
from fulltune.train.worker.passes import Passes, Positions

MOST_COUNTED_ROWS = 200_000
"""Of more rows than this, only the first steps are counted, and the rest taken to be like them."""
LOOP_SECONDS = 0.002
"""What transformers' loop and a log line cost in each step beside the passes, measured with a tiny model."""
SAMPLE_BYTES = 2**25
"""Written to see how fast the disk is."""
WORTH_A_LOOK = 0.02
"""Share of the training from which on a reading is taken a second time."""
_LEAST_TIMED_SECONDS = 0.1
_MOST_REPEATS = 5


def timed_forecast(
    passes: Passes,
    longest: Positions,
    seconds: tuple[float, float],
    step_seconds: float,
    *,
    first_step: int,
    test_share: float,
    folder: Path | None,
) -> TimeNeed:
    """Time more passes where they cost little against the run, and add everything up.

    Args:
        passes: Runs them.
        longest: The longest micro batch.
        seconds: Of its first and its second pass.
        step_seconds: Of clipping and updating.
        first_step: The steps up to this one are done.
        test_share: Tokens of the test rows as a share of the eval rows'.
        folder: Where checkpoints will lie; None leaves saving out.
    """
    quadratic = _quadratic(passes.trainer.model)
    schedule, parts = _schedule(passes, first_step, test_share)
    long = Readings(_shape(passes.lengths, longest).work(quadratic), seconds)
    rough = seconds[1] / long.work * schedule.work(quadratic) + step_seconds * schedule.steps
    budget = extra_seconds(rough)
    typical = _typical(passes, parts, long, schedule, quadratic, budget)
    train = speed(long, typical[0] if typical else None)
    # With torch.compile the second shape makes it give up fixed shapes, and that is all.
    compiled = passes.plan.torch_compile
    first_times = [readings.first_time_seconds for readings in typical]
    timings = Timings(
        train=train,
        evaluation=_eval_speed(passes, train, quadratic, budget),
        step_seconds=step_seconds + LOOP_SECONDS,
        # The least: a process's first passes also pay for what is done once.
        new_shape_seconds=0.0 if compiled else min(first_times, default=0.0),
        save_seconds=_save_seconds(passes, folder) if folder else 0.0,
        start_seconds=sum(first_times, long.first_time_seconds) if compiled else 0.0,
    )
    return forecast(schedule, timings, quadratic)


def _schedule(passes: Passes, first_step: int, test_share: float) -> tuple[Schedule, list[list[int]]]:
    """What is left to do, and its first micro batches."""
    plan = passes.plan
    steps = max(0, plan.total_steps - first_step)
    counted = min(steps, -(-MOST_COUNTED_ROWS // plan.global_batch_size))
    parts = [part for step in passes.trainer.sampler.passes(first_step, first_step + counted) for part in step]
    # Several processes take the eval batches in turn.
    evaluation = list(batches(longest_first(passes.eval_lengths), plan.eval_batch_size))[:: plan.num_processes]
    train = _counted(passes.lengths, parts)
    evaluations = times_between(first_step, plan.total_steps, plan.eval_steps)
    evaluations += plan.eval_on_start and first_step == 0
    rows = len(passes.eval_lengths)
    more = rows_of_points(plan, rows) / max(1, rows)
    # Of an evaluation's share of all that is read.
    generic = Counter({Shape(1, GENERIC_TOKENS): round(texts_read(plan, evaluations) / max(1.0, evaluations + more))})
    if plan.preserving is not None and counted:
        train[Shape(1, GENERIC_TOKENS)] += round(counted * plan.preserving.replay_rows / plan.num_processes)
    schedule = Schedule(
        steps=steps,
        train={shape: times * steps / counted for shape, times in train.items()},
        evaluation=_counted(passes.eval_lengths, evaluation) + generic,
        evaluations=round(evaluations + more),
        # Also at each evaluation.
        saves=times_between(first_step, plan.total_steps, plan.eval_steps, plan.save_steps),
        num_processes=plan.num_processes,
        test_share=test_share,
    )
    return schedule, parts


def _counted(lengths: np.ndarray, parts: Iterable[Positions]) -> Counter[Shape]:
    return Counter(_shape(lengths, part) for part in parts)


def _shape(lengths: np.ndarray, positions: Positions) -> Shape:
    return Shape(len(positions), int(lengths[list(positions)].max()))


def _typical(
    passes: Passes, parts: Sequence[Positions], long: Readings, schedule: Schedule, quadratic: float, budget: float
) -> tuple[Readings, ...]:
    """A micro batch of the mean work, and a second one where the first pass of the first one took suspiciously long;
    none when that would take too long.

    The longest pass alone says too little: its blocks go back to the system after each use and come anew, which makes
    its tokens up to twice as slow as those of shorter passes. So two typical passes may take as long as a longest one.
    """
    if not parts:
        return ()
    shapes = {_shape(passes.lengths, part): part for part in parts}
    mean = schedule.work(quadratic) / sum(schedule.train.values())
    nearest = sorted(shapes, key=lambda shape: abs(shape.work(quadratic) - mean))
    work = nearest[0].work(quadratic)
    if 2 * long.warm_seconds * work / long.work > max(budget, long.warm_seconds):
        return ()
    keep = passes.plan.gradient_accumulation_steps > 1

    def read(shape: Shape) -> Readings:
        times = _repeated(lambda: passes.train(shapes[shape], keep=keep)[1], budget)
        return Readings(shape.work(quadratic), times)

    first = read(nearest[0])
    rough = first.warm_seconds / work * schedule.work(quadratic)
    # What it cost more the first time, times the number of shapes, would weigh in the forecast: look again.
    if len(nearest) > 1 and first.first_time_seconds * len(schedule.train) > WORTH_A_LOOK * rough:
        return first, read(nearest[1])
    return (first,)


def _eval_speed(passes: Passes, train: Speed, quadratic: float, budget: float) -> Speed:
    """The longest eval batch must be tried; one from the middle says how long the others take. What a pass costs is
    judged by training's, because the first evaluation is cold."""
    passes.optimizer.zero_grad()
    order = list(batches(longest_first(passes.eval_lengths), passes.plan.eval_batch_size))
    longest, middle = order[0], order[len(order) // 2]
    work, usual = (_shape(passes.eval_lengths, part).work(quadratic) for part in (longest, middle))
    times = [passes.score(longest)]
    both = train.seconds(work)
    # Of forward and backward together the forward pass is a third; slower than both, it was cold.
    if min(times[0], both / 3) <= budget / 3 or times[0] > both:
        times.append(passes.score(longest))
    long = Readings(work, tuple(times))
    if 2 * long.warm_seconds * usual / work > budget:
        return speed(long, None)
    return speed(long, Readings(usual, _repeated(lambda: passes.score(middle), budget)))


def _repeated(measure: Callable[[], float], budget: float) -> tuple[float, ...]:
    """The first time, in which kernels are made, and one or more further ones."""
    times = [measure(), measure()]
    while len(times) <= _MOST_REPEATS and sum(times[1:]) < min(budget, _LEAST_TIMED_SECONDS):
        times.append(measure())
    return tuple(times)


def _quadratic(model: Any) -> float:
    """See `quadratic_share`; 0 for a model that is not made of layers of one width."""
    config = model.config.get_text_config()
    layers, hidden = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not isinstance(layers, int) or not isinstance(hidden, int):
        return 0.0
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in tables)
    return quadratic_share(layers, hidden, others)


def _save_seconds(passes: Passes, folder: Path) -> float:
    """Seconds of one checkpoint with its checksums: the small files as they are, and a sample of the tensors."""
    trainer, trial = passes.trainer, folder / "write-trial"
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad or not trainer.trained_only]
    states = [value for state in passes.optimizer.state.values() for value in state.values()]
    whole = sum(tensor.nbytes for tensor in (*weights, *states) if isinstance(tensor, torch.Tensor))
    sample = torch.rand(max(1, min(whole, SAMPLE_BYTES) // 4))
    try:
        began = time.perf_counter()
        trainer.processing_class.save_pretrained(trial)
        files.seal(trial)
        small = time.perf_counter() - began
        save_file({"sample": sample}, trial / "sample.safetensors")
        files.seal(trial)
        seconds = time.perf_counter() - began - small
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return small + seconds * max(1.0, whole / sample.nbytes)
