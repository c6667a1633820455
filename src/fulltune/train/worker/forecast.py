"""How long the training takes, from timed passes and the lengths of all rows: pure functions.

The order of the rows is known before the first step, and with it how much each forward pass is padded. The seconds of
a pass are `fixed + per_work * work`, a line through two measured passes: the longest one and one of the mean work.

A process's first passes are cold: libraries are read from the disk and set up, kernels are made, memory comes page by
page. Right after an installation that takes seconds, once. So what is multiplied by the number of passes is always read
from a batch that has run before.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fulltune.records.plan import TimeNeed, TimePart


@dataclass(frozen=True)
class Shape:
    """A padded batch."""

    rows: int
    length: int
    """Tokens of the longest row."""

    def work(self, quadratic: float) -> float:
        """In units of one token's multiplications with the weights.

        Args:
            quadratic: What attention adds for each further token of the row, see `quadratic_share`.
        """
        return self.rows * self.length * (1 + quadratic * self.length)


@dataclass(frozen=True)
class Timed:
    """A pass that was measured."""

    work: float
    seconds: float


@dataclass(frozen=True)
class Readings:
    """Every pass of one batch, in order."""

    work: float
    seconds: tuple[float, ...]

    @property
    def warm(self) -> Timed:
        """As it will be again and again: without the first pass, where there are others."""
        return Timed(self.work, statistics.median(self.seconds[1:] or self.seconds))

    @property
    def first_time_seconds(self) -> float:
        """What the first pass cost more."""
        return max(0.0, self.seconds[0] - self.warm.seconds)


@dataclass(frozen=True)
class Speed:
    """Seconds of a pass as a function of its work."""

    fixed: float
    per_work: float

    def seconds(self, work: float) -> float:
        return self.fixed + self.per_work * work


@dataclass(frozen=True)
class Rates:
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

    def work(self, quadratic: float) -> float:
        """Of all training passes."""
        return _total_work(self.train, quadratic)


def quadratic_share(num_layers: int, hidden_size: int, num_parameters: int) -> float:
    """Work of attention for each token of the row, as a share of the work with the weights.

    A token costs 2 operations per weight, and for each token that it looks at 4 per hidden unit and layer (scores and
    weighted sum): Kaplan et al. 2020, arXiv 2001.08361, table 1.

    Args:
        num_layers: Layers with attention.
        hidden_size: Width of the model.
        num_parameters: Without embeddings.
    """
    return 2 * num_layers * hidden_size / max(1, num_parameters)


def speed(longest: Timed, typical: Timed | None) -> Speed:
    """A line through both; through the origin when there is only one, or when the line would fall or start below 0."""
    if typical is None:
        return Speed(0.0, longest.seconds / longest.work)
    through_origin = Speed(0.0, typical.seconds / typical.work)
    if longest.work <= typical.work:
        return through_origin
    slope = (longest.seconds - typical.seconds) / (longest.work - typical.work)
    fixed = typical.seconds - slope * typical.work
    return Speed(fixed, slope) if slope > 0 and fixed >= 0 else through_origin


def is_cold(first_seconds: float, forward_and_backward_seconds: float) -> bool:
    """Whether the first evaluation of a batch says nothing: a forward pass alone never takes longer than both."""
    return first_seconds > forward_and_backward_seconds


def new_shape_seconds(first_times: Iterable[float]) -> float:
    """What the first pass of each shape costs more, from what it cost with some: the least, because a process's first
    passes also pay for what is done once."""
    return min(first_times, default=0.0)


def count(shapes: Iterable[Shape], factor: float = 1.0) -> dict[Shape, float]:
    """How often each shape comes, times the factor."""
    counted: dict[Shape, float] = {}
    for shape in shapes:
        counted[shape] = counted.get(shape, 0.0) + factor
    return counted


def num_evaluations(first_step: int, last_step: int, eval_steps: int) -> int:
    """After every `eval_steps`-th step after `first_step`, and after the last one."""
    return _times(first_step, last_step, (eval_steps,))


def num_saves(first_step: int, last_step: int, eval_steps: int, save_steps: int) -> int:
    """The same for checkpoints, which are also written at each evaluation."""
    return _times(first_step, last_step, (eval_steps, save_steps))


def forecast(schedule: Schedule, rates: Rates, quadratic: float) -> TimeNeed:
    """Seconds from the first step to the last, with evaluations and checkpoints."""
    passes = sum(schedule.train.values())
    train = rates.train.fixed * passes + rates.train.per_work * schedule.work(quadratic)
    train += rates.step_seconds * schedule.steps + rates.start_seconds
    train += rates.new_shape_seconds * len(schedule.train)
    one = rates.evaluation.fixed * sum(schedule.evaluation.values())
    one += rates.evaluation.per_work * _total_work(schedule.evaluation, quadratic)
    tokens = schedule.num_processes * sum(shape.rows * shape.length * times for shape, times in schedule.train.items())
    return TimeNeed(
        train_seconds=round(train, 3),
        eval_seconds=round(one * schedule.evaluations, 3),
        save_seconds=round(rates.save_seconds * schedule.saves, 3),
        tokens=round(tokens),
        tokens_per_second=round(tokens / train, 1) if train else 0.0,
        source="dry-run step",
    )


WORTH_A_LOOK = 0.02
"""Share of the training from which on a reading is taken a second time."""


def needs_another_shape(first_time_seconds: float, schedule: Schedule, rough_total: float) -> bool:
    """Whether what one shape cost more the first time, times the number of shapes, would weigh in the forecast."""
    return first_time_seconds * len(schedule.train) > WORTH_A_LOOK * rough_total


def scoring(need: TimeNeed, evaluations: int, eval_tokens: int, test_tokens: int) -> TimePart | None:
    """One model on the test rows, at the speed of an evaluation; None where no evaluation was forecast."""
    if not evaluations or not eval_tokens:
        return None
    seconds = need.eval_seconds / evaluations * test_tokens / eval_tokens
    return TimePart(name="scoring one model on the test rows", seconds=round(seconds, 3), basis="measured")


def extra_seconds(rough_total: float) -> float:
    """What further timed passes may take: a twentieth of the run, at least half a second, at most 20."""
    return min(20.0, max(0.5, 0.05 * rough_total))


def _total_work(passes: Mapping[Shape, float], quadratic: float) -> float:
    return sum(shape.work(quadratic) * times for shape, times in passes.items())


def _times(first_step: int, last_step: int, intervals: tuple[int, ...]) -> int:
    at = {step for every in intervals if every for step in range(every, last_step + 1, every)}
    return sum(step > first_step for step in at | {last_step}) if last_step > first_step else 0
