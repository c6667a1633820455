"""Events of a run, one record for each kind, as listeners receive them.

An attempt writes its events to `metrics.jsonl`. A new event needs a class here and, to be displayed, a case in
`cli.show.run.Display`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, ValidationError

from fulltune.records.base import Record
from fulltune.records.comparison import Expectation
from fulltune.records.data import DataSummary
from fulltune.records.forgetting import BudgetResult
from fulltune.records.plan import Plan, TimeNeed
from fulltune.records.training import Check


class Event(Record):
    """Base of all events."""

    model_config = ConfigDict(extra="ignore")  # a line of another version may have more fields
    kind: ClassVar[str] = ""
    """Name of the event in `metrics.jsonl`."""

    seconds: float = 0.0
    """Seconds since the attempt's process began."""

    def line(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.model_dump(exclude={"seconds"}), "seconds": self.seconds}


Listener = Callable[[Event], None]


def event_of(line: Mapping[str, Any]) -> Event | None:
    """Parse a line of `metrics.jsonl`; None if this version does not know it."""
    kind = next((event for event in Event.__subclasses__() if event.kind == line.get("kind")), None)
    try:
        return None if kind is None else kind.model_validate(line)
    except ValidationError:
        return None


class PhaseBegan(Event):
    """A phase of the run began."""

    kind = "phase"
    name: str


class RowsRead(Event):
    """Progress while rows are read outside of training."""

    kind = "rows"
    name: str
    done: int
    total: int | None
    share: float | None = None
    """Share of the work done, if it is not `done / total`."""


class DataPrepared(Event):
    """Rows are checked, tokenised and split."""

    kind = "data"
    summary: DataSummary
    is_reused: bool = False
    """True if an earlier command prepared them."""


class Planned(Event):
    """A trial has its plan."""

    kind = "plan"
    plan: Plan


class ChecksDone(Event):
    """The checks before step 1 are done."""

    kind = "checks"
    checks: tuple[Check, ...]


class Forecast(Event):
    """Duration and memory measured by a dry run."""

    kind = "forecast"
    time: TimeNeed
    peak_memory_bytes: int = 0
    """Peak above the memory used before the model was loaded."""


class StepLogged(Event):
    """A step whose loss is logged (`train.logging_steps`)."""

    kind = "train"
    step: int
    total_steps: int = 0
    epoch: float = 0.0
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float = 0.0
    """Training speed; 0 for images."""
    seconds_left: float = 0.0


class StepSkipped(Event):
    """A step whose update was skipped."""

    kind = "skipped"
    step: int
    reason: str
    rows: tuple[int, ...] = ()
    """Indices into the prepared train rows."""


class UpdatesMeasured(Event):
    """Effect of a step on a sample of values."""

    kind = "updates"
    step: int
    changed_share: float
    """Share of the sampled values that changed."""
    update_ratio: float
    """Norm of update over weights, median over tensors."""


class Evaluated(Event):
    """The eval rows were scored during training."""

    kind = "eval"
    step: int
    epoch: float = 0.0
    metrics: dict[str, Any]


class Steered(Event):
    """The weight of the replayed text was set by the measured drift."""

    kind = "steered"
    step: int
    drift: float
    error: float
    weight: float
    """Weight from the next step on."""


class Certified(Event):
    """A point within the budget was chosen and measured on sealed texts."""

    kind = "certified"
    result: BudgetResult


class Designed(Event):
    """Cost and power of a comparison."""

    kind = "expectation"
    expectation: Expectation
    metric: str
    margin: float


class Message(Event):
    """A sentence for the user."""

    kind = "message"
    text: str
    level: Literal["progress", "resumed", "next attempt", "warning"] = "progress"
    """Progress of a comparison, a resumed run, why an attempt failed, or a warning."""


class JournalEntry(Record):
    """A rare event for readers: a line of `journal.jsonl`."""

    model_config = ConfigDict(extra="ignore")
    time: str = "-"
    """Time in UTC, ISO 8601."""
    event: str = "-"
    detail: str = ""


def without_tables(listener: Listener) -> Listener:
    """Pass on only steps and warnings, for one of many runs."""

    def listen(event: Event) -> None:
        if isinstance(event, StepLogged) or (isinstance(event, Message) and event.level != "progress"):
            listener(event)

    return listen
