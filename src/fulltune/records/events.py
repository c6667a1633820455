"""What happens while a run works: a record for each kind of event, which its listener gets.

Those of an attempt at training are the lines of its `metrics.jsonl` as well: the event's kind, its fields, and the
seconds since its process began. A new event is a class here, and a case in `cli.show.run.Display` if it is to be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, ValidationError

from fulltune.records.base import Record
from fulltune.records.comparison import Expectation
from fulltune.records.data import DataSummary
from fulltune.records.held import HeldRun
from fulltune.records.plan import Plan, TimeNeed
from fulltune.records.training import Check


class Event(Record):
    """Something that happened."""

    model_config = ConfigDict(extra="ignore")  # a line of another version may have more fields
    kind: ClassVar[str] = ""
    """What it is called in `metrics.jsonl`."""

    seconds: float = 0.0
    """In `metrics.jsonl`: since the attempt's process began."""

    def line(self) -> dict[str, Any]:
        """As a line of `metrics.jsonl`."""
        return {"kind": self.kind, **self.model_dump(exclude={"seconds"}), "seconds": self.seconds}


Listener = Callable[[Event], None]


def event_of(line: Mapping[str, Any]) -> Event | None:
    """The event of a line of `metrics.jsonl`; None for one of another version, or without what it needs."""
    found = next((event for event in Event.__subclasses__() if event.kind == line.get("kind")), None)
    try:
        return None if found is None else found.model_validate(line)
    except ValidationError:
        return None


class PhaseBegan(Event):
    """A part of the run began."""

    kind = "phase"
    name: str


class RowsRead(Event):
    """So many rows are tokenised, audited, or read by a model outside of training."""

    kind = "rows"
    name: str
    """What is done with them."""
    done: int
    total: int | None
    share: float | None = None
    """Of the work: long rows take longer; None: as of the rows."""


class DataPrepared(Event):
    """Rows are checked, tokenised and split."""

    kind = "data"
    summary: DataSummary
    is_known: bool = False
    """They were already there when the command began."""


class Planned(Event):
    """A trial has its plan."""

    kind = "plan"
    plan: Plan


class ChecksDone(Event):
    """What was checked before step 1."""

    kind = "checks"
    checks: tuple[Check, ...]


class Forecast(Event):
    """How long the training will take, measured by a dry run of two steps."""

    kind = "forecast"
    time: TimeNeed
    peak_memory_bytes: int = 0
    """Beyond what was held before the model was loaded."""


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
    """0: images have none."""
    seconds_left: float = 0.0


class StepSkipped(Event):
    """A step whose update was left out."""

    kind = "skipped"
    step: int
    reason: str
    rows: tuple[int, ...] = ()
    """Its rows' places in the prepared train rows, from 0; mixed rows are counted on behind them."""


class UpdatesMeasured(Event):
    """What a step did to some values of each trained tensor."""

    kind = "updates"
    step: int
    changed: float
    """Share of these values whose stored value changed."""
    update_to_weight: float
    """Size of a tensor's update to its own, the median over tensors."""


class Evaluated(Event):
    """The eval rows were scored during training."""

    kind = "eval"
    step: int
    epoch: float = 0.0
    metrics: dict[str, Any]


class Steered(Event):
    """The weight of the generic text that is trained along was set, by how far it had moved."""

    kind = "steered"
    step: int
    moved: float
    error: float
    weight: float
    """From the next step on."""


class Certified(Event):
    """A point within the budget was chosen, and the sealed texts were opened."""

    kind = "certified"
    held: HeldRun


class Designed(Event):
    """What a comparison will cost and what it can decide."""

    kind = "expectation"
    expectation: Expectation
    metric: str
    margin: float


class Said(Event):
    """A sentence for the user."""

    kind = "said"
    text: str
    level: Literal["progress", "resumed", "next attempt", "warning"] = "progress"
    """How a comparison or a search goes on; where a resumed run goes on; why an attempt failed, where another one with
    other settings may not; or what is wrong while training goes on."""


class JournalEntry(Record):
    """A line of an attempt's `journal.jsonl`: something that happens rarely, for people."""

    model_config = ConfigDict(extra="ignore")
    time: str = "-"
    """ISO 8601, in UTC."""
    event: str = "-"
    detail: str = ""


def without_tables(listener: Listener) -> Listener:
    """Of one of many runs only what moves: the tables of all would hide what comes of them."""

    def listen(event: Event) -> None:
        if isinstance(event, StepLogged) or (isinstance(event, Said) and event.level != "progress"):
            listener(event)

    return listen
