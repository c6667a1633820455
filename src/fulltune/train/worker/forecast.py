"""How long the training takes, by the work of all its passes and a line (`fixed + per_work * work`) through two timed
passes of the dry run, each after a first, cold one."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from safetensors.torch import save_file

from fulltune import files
from fulltune.inference.run import Share, batches, longest_first
from fulltune.plan.time import GENERIC_TOKENS, further_seconds
from fulltune.records.plan import TimeNeed, TimePart
from fulltune.train.loop.guarded_step import gradients_are_finite
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.trainer import ITEMS, FullTrainer
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
class Load:
    """Forward passes that are alike."""

    passes: float
    work: float
    """Of all together, in multiplications of a token with the weights: see `works`."""


@dataclass(frozen=True)
class Speed:
    """Seconds of a pass as a function of its work."""

    fixed: float
    per_work: float

    def seconds(self, load: Load) -> float:
        return self.fixed * load.passes + self.per_work * load.work


@dataclass(frozen=True)
class Timings:
    """What was measured."""

    train: Speed
    """Forward and backward."""
    evaluation: Speed
    """Forward alone."""
    step_seconds: float
    """Clipping, optimizer and zeroing, once per step."""
    save_seconds: float
    """One checkpoint, checksums included."""
    once_seconds: float = 0.0
    """Compiling, or what the first pass of each shape costs more, because kernels are made for it."""


@dataclass(frozen=True)
class Schedule:
    """What is left to do, of each process."""

    steps: int
    tokens: float
    """Of all processes, padding included."""
    train: Load
    evaluation: Load
    """One evaluation."""
    evaluations: int
    saves: int
    test_share: float = 0.0
    """Tokens of the test rows as a share of the eval rows'; 0: not known."""


def works(shapes: np.ndarray, quadratic: float) -> np.ndarray:
    """Work of each pass, by its rows and the tokens of its longest row: shapes[passes, 2]; `quadratic` is what each
    token adds for each one that it sees, as a share of its multiplications with the weights."""
    rows, length = shapes.astype(float).T
    return rows * length * (1 + quadratic * length)


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


def forecast(schedule: Schedule, timings: Timings) -> TimeNeed:
    """Seconds from the first step to the last, with evaluations and checkpoints, and of scoring the test rows."""
    train = timings.train.seconds(schedule.train) + timings.step_seconds * schedule.steps + timings.once_seconds
    evaluation = timings.evaluation.seconds(schedule.evaluation)
    around: tuple[TimePart, ...] = ()
    if schedule.evaluations and schedule.test_share:
        seconds = round(evaluation * schedule.test_share, 3)
        around = (TimePart(name="scoring one model on the test rows", seconds=seconds, basis="measured"),)
    to_stop = timings.save_seconds + (evaluation if schedule.evaluations else 0.0)
    return TimeNeed(
        train_seconds=round(train, 3),
        eval_seconds=round(evaluation * schedule.evaluations, 3),
        save_seconds=round(timings.save_seconds * schedule.saves, 3),
        tokens=round(schedule.tokens),
        tokens_per_second=round(schedule.tokens / train, 1) if train else 0.0,
        source="dry-run step",
        stop_seconds=round(train / schedule.steps + to_stop, 3) if schedule.steps else 0.0,
        around=around,
    )


# ---- measured ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passes:
    """Runs passes; all processes are given the first one's seconds, so that all decide on the same further passes."""

    inputs: AttemptInputs
    trainer: FullTrainer
    model: Any
    """As the Trainer's loop has it: with autocast, compiled, with several processes in `DistributedDataParallel`."""
    optimizer: Any
    evaluate: Callable[[Share], object]
    """Takes eval rows as an evaluation does."""

    @property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each train row and of each eval row."""
        eval_rows: Any = self.trainer.eval_dataset
        return np.asarray(self.trainer.sampler.lengths), np.asarray(eval_rows["length"])

    def train(self, positions: Positions, *, keep: bool = False) -> tuple[float, float]:
        """Forward and backward of these rows, added to present gradients with `keep`: the loss and the seconds."""
        trainer, rows = self.trainer, cast("Any", self.trainer.train_dataset)
        if not keep:
            self.optimizer.zero_grad()
        began = self._now()
        self.model.train()
        batch = send_to_device(trainer.collated([rows[i] for i in positions]), trainer.args.device)
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
        self.evaluate(Share(cast("Any", self.trainer.eval_dataset), positions))
        return self._since(began)

    def _now(self) -> float:
        if self.inputs.plan.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _since(self, began: float) -> float:
        seconds = self._now() - began
        return float(distributed.from_first(seconds)) if self.trainer.args.world_size > 1 else seconds


def timed_forecast(passes: Passes, longest: Positions, seconds: tuple[float, float], step_seconds: float) -> TimeNeed:
    """Time more passes where they cost little against the run, and add everything up; `seconds` are those of the first
    two passes at the longest micro batch."""
    plan, quadratic = passes.inputs.plan, _quadratic(passes.trainer.model)
    steps = max(0, plan.total_steps - passes.inputs.request.first_step)
    parts, scale = _counted_passes(passes, steps)
    shapes = _shapes(passes.lengths[0], parts)
    work, long = works(shapes, quadratic), float(works(_shapes(passes.lengths[0], [longest]), quadratic)[0])
    budget = further_seconds(seconds[1] / long * float(work.sum()) * scale + step_seconds * steps)
    typical, cold = None, 0.0
    if parts:
        at = int(np.argmin(abs(work - work.mean())))
        # The longest pass alone says too little: its blocks go back to the system after each use and come anew, which
        # makes its tokens up to twice as slow as those of shorter passes.
        if 2 * seconds[1] * work[at] / long <= max(budget, seconds[1]):
            keep = plan.gradient_accumulation_steps > 1
            first, warm = (passes.train(parts[at], keep=keep)[1] for _ in range(2))
            typical, cold = (float(work[at]), warm), max(0.0, first - warm)
    train = speed((long, seconds[1]), typical)
    once = 0.0
    if plan.torch_compile:  # the second shape makes it give up fixed shapes, and that is all
        once = max(0.0, seconds[0] - seconds[1]) + cold
    elif typical is not None:
        # At most as much as the pass itself: a process's first passes also pay for what is done once.
        once = min(cold, typical[1]) * len(np.unique(shapes, axis=0))
    forward = _forward_share(passes, train, quadratic, budget)
    is_saved = passes.inputs.is_main and not passes.inputs.request.probe
    timings = Timings(
        train=train,
        evaluation=Speed(forward * train.fixed, forward * train.per_work),
        step_seconds=step_seconds + LOOP_SECONDS,
        save_seconds=_save_seconds(passes) if is_saved else 0.0,
        once_seconds=once,
    )
    return forecast(_schedule(passes, steps, shapes, scale, quadratic), timings)


def _counted_passes(passes: Passes, steps: int) -> tuple[list[Positions], float]:
    """The micro batches of the coming steps, or of the first of them, and what these are multiplied by."""
    plan, first_step = passes.inputs.plan, passes.inputs.request.first_step
    counted = min(steps, -(-MOST_COUNTED_ROWS // plan.global_batch_size))
    parts: list[Positions] = [
        part for step in passes.trainer.sampler.passes(first_step, first_step + counted) for part in step
    ]
    return parts, steps / max(1, counted)


def _schedule(passes: Passes, steps: int, shapes: np.ndarray, scale: float, quadratic: float) -> Schedule:
    """What is left to do."""
    plan, first_step, splits = passes.inputs.plan, passes.inputs.request.first_step, passes.inputs.summary.splits
    eval_lengths = passes.lengths[1]
    evaluations = times_between(first_step, plan.total_steps, plan.eval_steps)
    evaluations += plan.eval_on_start and first_step == 0
    more = plan.generic.scored_rows / max(1, len(eval_lengths))
    # Several processes take the eval batches in turn.
    parts = list(batches(longest_first(eval_lengths), plan.eval_batch_size))[:: plan.num_processes]
    steered = plan.total_steps // plan.generic.steer_steps if plan.generic.steer_steps else 0
    texts = plan.generic.watched * (evaluations + steered) + plan.generic.read_once
    read = texts / max(1.0, evaluations + more)  # of all that is read an evaluation's share
    trained = steps * plan.generic.rows / plan.num_processes
    [generic] = works(np.array([[1, GENERIC_TOKENS]]), quadratic)
    return Schedule(
        steps=steps,
        tokens=plan.num_processes * (float(shapes.prod(axis=1).sum()) * scale + trained * GENERIC_TOKENS),
        train=Load(len(shapes) * scale + trained, float(works(shapes, quadratic).sum()) * scale + trained * generic),
        evaluation=Load(
            len(parts) + read, float(works(_shapes(eval_lengths, parts), quadratic).sum()) + read * generic
        ),
        evaluations=round(evaluations + more),
        # Also at each evaluation.
        saves=times_between(first_step, plan.total_steps, plan.eval_steps, plan.save_steps),
        test_share=splits["test"].tokens / splits["eval"].tokens if splits["eval"].tokens else 0.0,
    )


def _shapes(lengths: np.ndarray, parts: Iterable[Positions]) -> np.ndarray:
    """Rows and tokens of the longest row of each pass: [passes, 2]."""
    return np.array([(len(part), lengths[list(part)].max()) for part in parts], np.int64).reshape(-1, 2)


def _forward_share(passes: Passes, train: Speed, quadratic: float, budget: float) -> float:
    """Seconds of an evaluation's pass over those of a training pass of the same work, by the longest eval batch; again
    where that costs little, because the first one is cold."""
    passes.optimizer.zero_grad()
    lengths = passes.lengths[1]
    longest = next(iter(batches(longest_first(lengths), passes.inputs.plan.eval_batch_size)))
    seconds = passes.score(longest)
    both = train.seconds(Load(1, float(works(_shapes(lengths, [longest]), quadratic)[0])))
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


def _save_seconds(passes: Passes) -> float:
    """Seconds of one checkpoint with its checksums, by its small files and a sample of its tensors."""
    trainer, trial = passes.trainer, passes.inputs.request.checkpoints / "write-trial"
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad or not trainer.trained_only]
    states = [value for state in passes.optimizer.state.values() for value in state.values()]
    whole = sum(tensor.nbytes for tensor in (*weights, *states) if isinstance(tensor, torch.Tensor))
    sample = torch.rand(max(1, min(whole, SAMPLE_BYTES) // 4))
    try:
        began = time.perf_counter()
        cast("Any", trainer.processing_class).save_pretrained(trial)
        files.seal(trial)
        small = time.perf_counter() - began
        save_file({"sample": sample}, trial / "sample.safetensors")
        files.seal(trial)
        seconds = time.perf_counter() - began - small
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return small + seconds * max(1.0, whole / sample.nbytes)
