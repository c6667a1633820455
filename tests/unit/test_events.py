"""Events as lines of `metrics.jsonl` and back."""

from __future__ import annotations

import json
import math

import pytest

from fulltune.records import events
from fulltune.records.plan import TimeNeed
from fulltune.records.scores import Answer
from fulltune.records.training import Check

LINES = (
    events.PhaseBegan(name="training", seconds=1.5),
    events.StepLogged(step=3, total_steps=9, loss=math.inf, grad_norm=None, seconds=2.0),
    events.Evaluated(step=3, epoch=0.5, metrics={"accuracy": 0.5, "rows": 4}),
    events.Answered(step=3, answers=(Answer(text="1 + 1", expected="2", predicted="3"),), rows=4, took=0.5),
    events.ChecksDone(checks=(Check(name="labels", result="all", passed=True),)),
    events.Forecast(
        time=TimeNeed(
            train_seconds=9.0,
            eval_seconds=1.0,
            save_seconds=0.5,
            tokens=4,
            tokens_per_second=2.0,
            source="dry-run step",
        )
    ),
    events.Message(text="…", level="warning"),
)


@pytest.mark.parametrize("event", LINES, ids=lambda event: event.kind)
def test_event_is_read_back_from_its_line(event: events.Event) -> None:
    line = json.loads(json.dumps(event.line()))
    assert line["kind"] == event.kind
    assert events.parse_event(line) == event
    assert events.parse_event({**line, "of a later version": 1}) == event


def test_every_event_has_a_kind_of_its_own() -> None:
    kinds = [event.kind for event in events.Event.__subclasses__()]
    assert all(kinds)
    assert len(set(kinds)) == len(kinds)


def test_one_of_many_runs_says_where_it_goes_on_and_what_is_wrong_without_its_tables() -> None:
    heard: list[events.Event] = []
    levels = ("progress", "resumed", "next attempt", "warning")
    listen = events.only_steps_and_warnings(heard.append)
    for event in (*LINES[:6], *(events.Message(text="…", level=level) for level in levels)):
        listen(event)
    assert [event.level if isinstance(event, events.Message) else event.kind for event in heard] == [
        "train",
        *levels[1:],
    ]


@pytest.mark.parametrize("line", [{}, {"kind": "later"}, {"kind": "train", "loss": 1.0}, {"kind": "eval", "step": 1}])
def test_line_of_another_shape_is_no_event(line: dict[str, object]) -> None:
    assert events.parse_event(line) is None
