from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, ValidationError

from fulltune.records.base import Record
from fulltune.records.comparison import Expectation
from fulltune.records.data import DataSummary
from fulltune.records.forgetting import BudgetResult
from fulltune.records.plan import Plan, TimeNeed
from fulltune.records.scores import Answer
from fulltune.records.training import Check


class Event(Record):
    model_config = ConfigDict(extra="ignore")  # a line of another version may have more fields
    kind: ClassVar[str] = ""

    seconds: float = 0.0
    """Seconds since the attempt's process started."""

    def line(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.model_dump(exclude={"seconds"}), "seconds": self.seconds}


Listener = Callable[[Event], None]


def parse_event(line: Mapping[str, Any]) -> Event | None:
    """Parse a line of `metrics.jsonl`; return None if this version cannot read the line."""
    kind = next((event for event in Event.__subclasses__() if event.kind == line.get("kind")), None)
    try:
        return None if kind is None else kind.model_validate(line)
    except ValidationError:
        return None


class PhaseBegan(Event):
    kind = "phase"
    name: str


class RowsRead(Event):
    """Progress of reading rows outside of training, or weights within a step."""

    kind = "rows"
    name: str
    done: int
    total: int | None
    share: float | None = None
    unit: Literal["rows", "bytes"] = "rows"
    part: str = ""
    """What is being read."""


class DataPrepared(Event):
    kind = "data"
    summary: DataSummary
    is_reused: bool = False


class Planned(Event):
    kind = "plan"
    plan: Plan


class ChecksDone(Event):
    kind = "checks"
    checks: tuple[Check, ...]


class Forecast(Event):
    """Duration and memory of the run, measured by a dry run."""

    kind = "forecast"
    time: TimeNeed
    peak_memory_bytes: int = 0


class StepLogged(Event):
    """A training step whose loss is logged (every `train.logging_steps`)."""

    kind = "train"
    step: int
    total_steps: int = 0
    epoch: float = 0.0
    loss: float | None = None
    router_loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float = 0.0
    """Training speed, or 0 for images."""
    seconds_left: float = 0.0


class StepSkipped(Event):
    """A training step whose update was skipped."""

    kind = "skipped"
    step: int
    reason: str
    rows: tuple[int, ...] = ()
    """Indices into the prepared train rows."""


class UpdatesMeasured(Event):
    """Which share of a sample of the weights one step changed."""

    kind = "updates"
    step: int
    changed_share: float


class Evaluated(Event):
    kind = "eval"
    step: int
    epoch: float = 0.0
    metrics: dict[str, Any]


class Answered(Event):
    kind = "answers"
    step: int
    answers: tuple[Answer, ...]
    """Answers to a few eval prompts, the same at each evaluation."""
    rows: int
    """Number of all generated answers."""
    unfinished: int = 0
    """How many of these reached the length limit."""
    took: float = 0.0
    """Seconds for generating and scoring them."""


class Steered(Event):
    """Sent when a drift measurement has changed the weight of the replayed text."""

    kind = "steered"
    step: int
    drift: float
    error: float
    weight: float


class Certified(Event):
    """Sent when weights within the drift budget have been chosen and measured on held-out texts."""

    kind = "certified"
    result: BudgetResult


class Designed(Event):
    """Forecast cost and detectable differences of a comparison."""

    kind = "expectation"
    expectation: Expectation
    metric: str
    margin: float


class Message(Event):
    kind = "message"
    text: str
    level: Literal["progress", "resumed", "next attempt", "warning"] = "progress"


class JournalEntry(Record):
    """A rare event, stored as one line of `journal.jsonl`."""

    model_config = ConfigDict(extra="ignore")
    time: str = "-"
    event: str = "-"
    detail: str = ""


def only_steps_and_warnings(listener: Listener) -> Listener:
    """Return a listener that passes only steps, warnings and resumes on to `listener`."""

    def listen(event: Event) -> None:
        if isinstance(event, StepLogged) or (isinstance(event, Message) and event.level != "progress"):
            listener(event)

    return listen
