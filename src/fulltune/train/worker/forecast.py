"""How long the training takes, from timed passes and the lengths of all rows: pure functions.

The order of the rows is known before the first step, and with it how much each forward pass is padded. The seconds of
a pass are `fixed + per_work * work`, a line through two measured passes: the longest one and one of the mean work.

A process's first passes are cold: libraries are read from the disk and set up, kernels are made, memory comes page by
page. Right after an installation that takes seconds, once. So what is multiplied by the number of passes is always read
from a batch that has run before.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
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
class Readings:
    """Every pass of one batch, in order."""

    work: float
    seconds: tuple[float, ...]

    @property
    def warm_seconds(self) -> float:
        """As it will be again and again: without the first pass, where there are others."""
        return statistics.median(self.seconds[1:] or self.seconds)

    @property
    def first_time_seconds(self) -> float:
        """What the first pass cost more."""
        return max(0.0, self.seconds[0] - self.warm_seconds)


@dataclass(frozen=True)
class Speed:
    """Seconds of a pass as a function of its work."""

    fixed: float
    per_work: float

    def seconds(self, work: float, passes: float = 1) -> float:
        """Of passes that together have this work."""
        return self.fixed * passes + self.per_work * work


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


def speed(longest: Readings, typical: Readings | None) -> Speed:
    """A line through both; through the origin when there is only one, or when the line would fall or start below 0."""
    if typical is None:
        return Speed(0.0, longest.warm_seconds / longest.work)
    through_origin = Speed(0.0, typical.warm_seconds / typical.work)
    if longest.work <= typical.work:
        return through_origin
    slope = (longest.warm_seconds - typical.warm_seconds) / (longest.work - typical.work)
    fixed = typical.warm_seconds - slope * typical.work
    return Speed(fixed, slope) if slope > 0 and fixed >= 0 else through_origin


def times_between(first_step: int, last_step: int, *intervals: int) -> int:
    """At how many steps after `first_step` something is done: every n-th of each interval (0: never), and the last."""
    at = {step for every in intervals if every for step in range(every, last_step + 1, every)}
    return sum(step > first_step for step in at | {last_step}) if last_step > first_step else 0


def forecast(schedule: Schedule, timings: Timings, quadratic: float) -> TimeNeed:
    """Seconds from the first step to the last, with evaluations and checkpoints, and of scoring the test rows."""
    train = timings.train.seconds(schedule.work(quadratic), sum(schedule.train.values()))
    train += timings.step_seconds * schedule.steps + timings.start_seconds
    train += timings.new_shape_seconds * len(schedule.train)
    once = timings.evaluation.seconds(_total_work(schedule.evaluation, quadratic), sum(schedule.evaluation.values()))
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


def extra_seconds(rough_total: float) -> float:
    """What further timed passes may take: a twentieth of the run, at least half a second, at most 20."""
    return min(20.0, max(0.5, 0.05 * rough_total))


def _total_work(passes: Mapping[Shape, float], quadratic: float) -> float:
    return sum(shape.work(quadratic) * times for shape, times in passes.items())
