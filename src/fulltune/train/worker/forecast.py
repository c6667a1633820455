"""How long the training takes, by the lengths of all rows and a line (`fixed + per_work * work`) through two timed
passes of the dry run, each after a first, cold one."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from safetensors.torch import save_file

from fulltune import files
from fulltune.inference.run import batches, longest_first
from fulltune.plan.time import GENERIC_TOKENS, further_seconds, rows_of_points, texts_read
from fulltune.records.plan import Plan, TimeNeed, TimePart
from fulltune.train.loop.guarded_step import gradients_are_finite
from fulltune.train.loop.trainer import ITEMS
from fulltune.train.worker import distributed

Positions = Sequence[int]
MOST_COUNTED_ROWS = 200_000
"""Of more rows than this, only the first steps are counted, and the rest taken to be like them."""
LOOP_SECONDS = 0.002
"""What transformers' loop and a log line cost in each step beside the passes, measured with a tiny model."""
SAMPLE_BYTES = 2**25
"""Written to see how fast the disk is."""


# ---- pure --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A padded batch."""

    rows: int
    length: int
    """Tokens of the longest row."""

    def work(self, quadratic: float) -> float:
        """Work in units of one token's multiplications with the weights, with `quadratic` more for each token seen."""
        return self.rows * self.length * (1 + quadratic * self.length)


@dataclass(frozen=True)
class Speed:
    """Seconds of a pass as a function of its work."""

    fixed: float
    per_work: float

    def seconds(self, passes: Mapping[Shape, float], quadratic: float) -> float:
        """Of so many passes of each shape."""
        return self.fixed * sum(passes.values()) + self.per_work * _total_work(passes, quadratic)

    def times(self, factor: float) -> Speed:
        return Speed(factor * self.fixed, factor * self.per_work)


@dataclass(frozen=True)
class Timings:
    """What was measured."""

    train: Speed
    """Forward and backward."""
    evaluation: Speed
    """Forward alone."""
    step_seconds: float
    """Clipping, optimizer and zeroing, once per step."""
    new_shape_seconds: float
    """What the first pass of each shape costs more, because kernels are made for it."""
    save_seconds: float
    """One checkpoint, checksums included."""
    start_seconds: float = 0.0
    """Once: compiling."""


@dataclass(frozen=True)
class Schedule:
    """What is left to do, of each process."""

    steps: int
    train: Mapping[Shape, float]
    """Number of forward passes of each shape; can be a fraction, when it was counted on a part of the steps."""
    evaluation: Mapping[Shape, float]
    """The same for one evaluation."""
    evaluations: int
    saves: int
    num_processes: int = 1
    test_share: float = 0.0
    """Tokens of the test rows as a share of the eval rows'; 0: not known."""


def quadratic_share(num_layers: int, hidden_size: int, num_parameters: int) -> float:
    """Work of attention for each token of the row as a share of the work with the weights, embeddings not counted
    (Kaplan et al. 2020, arXiv 2001.08361, table 1)."""
    return 2 * num_layers * hidden_size / max(1, num_parameters)


def speed(longest: tuple[float, float], typical: tuple[float, float] | None) -> Speed:
    """A line through two passes, each work and seconds, or through the origin where it would fall or start below 0."""
    work, seconds = longest if typical is None else typical
    through_origin = Speed(0.0, seconds / work)
    if typical is None or longest[0] <= typical[0]:
        return through_origin
    slope = (longest[1] - seconds) / (longest[0] - work)
    fixed = seconds - slope * work
    return Speed(fixed, slope) if slope > 0 and fixed >= 0 else through_origin


def times_between(first_step: int, last_step: int, *intervals: int) -> int:
    """At how many steps after `first_step` something is done: every n-th of each interval (0: never), and the last."""
    at = {step for every in intervals if every for step in range(every, last_step + 1, every)}
    return sum(step > first_step for step in at | {last_step}) if last_step > first_step else 0


def forecast(schedule: Schedule, timings: Timings, quadratic: float) -> TimeNeed:
    """Seconds from the first step to the last, with evaluations and checkpoints, and of scoring the test rows."""
    train = timings.train.seconds(schedule.train, quadratic)
    train += timings.step_seconds * schedule.steps + timings.start_seconds
    train += timings.new_shape_seconds * len(schedule.train)
    once = timings.evaluation.seconds(schedule.evaluation, quadratic)
    tokens = schedule.num_processes * sum(shape.rows * shape.length * times for shape, times in schedule.train.items())
    around: tuple[TimePart, ...] = ()
    if schedule.evaluations and schedule.test_share:
        seconds = round(once * schedule.test_share, 3)
        around = (TimePart(name="scoring one model on the test rows", seconds=seconds, basis="measured"),)
    to_stop = timings.save_seconds + (once if schedule.evaluations else 0.0)
    return TimeNeed(
        train_seconds=round(train, 3),
        eval_seconds=round(once * schedule.evaluations, 3),
        save_seconds=round(timings.save_seconds * schedule.saves, 3),
        tokens=round(tokens),
        tokens_per_second=round(tokens / train, 1) if train else 0.0,
        source="dry-run step",
        stop_seconds=round(train / schedule.steps + to_stop, 3) if schedule.steps else 0.0,
        around=around,
    )


def _total_work(passes: Mapping[Shape, float], quadratic: float) -> float:
    return sum(shape.work(quadratic) * times for shape, times in passes.items())


# ---- measured ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passes:
    """Runs passes; all processes are given the first one's seconds, so that all decide on the same further passes."""

    trainer: Any
    """The `FullTrainer`."""
    rows: Any
    plan: Plan
    model: Any
    """As the Trainer's loop has it: with autocast, compiled, with several processes in `DistributedDataParallel`."""
    optimizer: Any
    evaluate: Callable[[Positions], object]
    lengths: np.ndarray
    """lengths[rows] of the train rows, in tokens."""
    eval_lengths: np.ndarray
    """eval_lengths[rows]."""

    def train(self, positions: Positions, *, keep: bool = False) -> tuple[float, float]:
        """Forward and backward of these rows, added to present gradients with `keep`: the loss and the seconds."""
        trainer = self.trainer
        if not keep:
            self.optimizer.zero_grad()
        began = self._now()
        self.model.train()
        batch = send_to_device(trainer.collated([self.rows[i] for i in positions]), trainer.args.device)
        # All processes try the same rows, and the Trainer multiplies by their number.
        num_items = torch.tensor(batch.pop(ITEMS) * trainer.args.world_size, device=trainer.args.device)
        loss = trainer.compute_loss(self.model, batch, num_items_in_batch=num_items)
        value = float(loss.detach())
        if self._all(math.isfinite(value)):
            loss.backward()
        return value, self._since(began)

    def step(self) -> float:
        """Clip and update with a rate of 0: the seconds; gradients that are not finite are left to step 1's guard."""
        model = self.trainer.model
        if not self._all(gradients_are_finite(model.parameters())):
            return 0.0
        began = self._now()
        if self.trainer.args.max_grad_norm:
            self.trainer._clip_grad_norm(model)
        self.optimizer.step()
        return self._since(began)

    def _all(self, finite: bool) -> bool:
        """Whether it is so in all processes that share out the weights: they go on together."""
        return all(distributed.gathered(int(finite))) if self.trainer.is_shared else finite

    def score(self, positions: Positions) -> float:
        """These eval rows as an evaluation takes them: the seconds."""
        began = self._now()
        self.evaluate(positions)
        return self._since(began)

    def _now(self) -> float:
        if self.plan.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _since(self, began: float) -> float:
        seconds = self._now() - began
        return float(distributed.from_first(seconds)) if self.trainer.args.world_size > 1 else seconds


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
    """Time more passes where they cost little against the run, and add everything up."""
    quadratic = _quadratic(passes.trainer.model)
    schedule, shapes = _schedule(passes, first_step, test_share)
    long, work = _shape(passes.lengths, longest).work(quadratic), _total_work(schedule.train, quadratic)
    budget = further_seconds(seconds[1] / long * work + step_seconds * schedule.steps)
    typical, cold = None, 0.0
    if shapes:
        mean = work / sum(schedule.train.values())
        shape = min(shapes, key=lambda one: abs(one.work(quadratic) - mean))
        # The longest pass alone says too little: its blocks go back to the system after each use and come anew, which
        # makes its tokens up to twice as slow as those of shorter passes.
        if 2 * seconds[1] * shape.work(quadratic) / long <= max(budget, seconds[1]):
            keep = passes.plan.gradient_accumulation_steps > 1
            first, warm = (passes.train(shapes[shape], keep=keep)[1] for _ in range(2))
            typical, cold = (shape.work(quadratic), warm), max(0.0, first - warm)
    train = speed((long, seconds[1]), typical)
    compiled = passes.plan.torch_compile  # the second shape makes it give up fixed shapes, and that is all
    timings = Timings(
        train=train,
        evaluation=train.times(_forward_share(passes, train, quadratic, budget)),
        step_seconds=step_seconds + LOOP_SECONDS,
        # At most as much as the pass itself: a process's first passes also pay for what is done once.
        new_shape_seconds=0.0 if compiled or typical is None else min(cold, typical[1]),
        save_seconds=_save_seconds(passes, folder) if folder else 0.0,
        start_seconds=max(0.0, seconds[0] - seconds[1]) + cold if compiled else 0.0,
    )
    return forecast(schedule, timings, quadratic)


def _schedule(passes: Passes, first_step: int, test_share: float) -> tuple[Schedule, dict[Shape, Positions]]:
    """What is left to do, and a micro batch of each shape."""
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
    return schedule, {_shape(passes.lengths, part): part for part in parts}


def _counted(lengths: np.ndarray, parts: Iterable[Positions]) -> Counter[Shape]:
    return Counter(_shape(lengths, part) for part in parts)


def _shape(lengths: np.ndarray, positions: Positions) -> Shape:
    return Shape(len(positions), int(lengths[list(positions)].max()))


def _forward_share(passes: Passes, train: Speed, quadratic: float, budget: float) -> float:
    """Seconds of an evaluation's pass over those of a training pass of the same work, by the longest eval batch; again
    where that costs little, because the first one is cold."""
    passes.optimizer.zero_grad()
    longest = next(iter(batches(longest_first(passes.eval_lengths), passes.plan.eval_batch_size)))
    seconds = passes.score(longest)
    both = train.seconds({_shape(passes.eval_lengths, longest): 1}, quadratic)
    if min(seconds, both) <= budget or seconds > both:
        seconds = passes.score(longest)
    return min(1.0, seconds / both)


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
    """Seconds of one checkpoint with its checksums, by its small files and a sample of its tensors."""
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
