"""The log beside the runs of who scored which test rows: written by many, read by each report, in no one's way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fulltune.evaluate import scoring
from fulltune.files import append_line, read_json_lines
from fulltune.inference.store import hash_rows, make_record_batch, row_as_json, write_rows
from fulltune.records.events import Event, Message
from fulltune.records.run import ACCESSES, Access
from fulltune.records.training import Outcome

ROWS = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(6)]


def run_folder(folder: Path, rows: Sequence[dict[str, Any]] = ROWS) -> Path:
    texts = [row_as_json(f"t.csv:{place}", row) for place, row in enumerate(rows)]
    write_rows(folder / "data" / "test", [make_record_batch([{"labels": 1}] * len(texts), texts)])
    return folder


def note(folder: Path, trained: int = 1, listener: Any = lambda event: None) -> None:
    outcome = Outcome(status="done", reason="all done", trial="full-seed1", attempt=1, steps=trained)
    scoring.log_test_access(folder, listener, outcome)


def test_every_scoring_of_the_same_rows_is_known_to_each_run_in_whatever_order_they_stand(tmp_path: Path) -> None:
    note(run_folder(tmp_path / "a"))
    note(run_folder(tmp_path / "b", ROWS[::-1]), trained=2)
    note(run_folder(tmp_path / "c", [*ROWS[:5], {**ROWS[5], "label": "c"}]), trained=3)
    assert [one.run for one in Access.load_for_same_rows(tmp_path / "a")] == ["a", "b"]
    assert [one.run for one in Access.load_for_same_rows(tmp_path / "c")] == ["c"]
    assert Access.load_for_same_rows(tmp_path / "d") == ()
    first = Access.load_for_same_rows(tmp_path / "b")[0]
    assert first.trial == "full-seed1"
    assert first.model != Access.load_for_same_rows(tmp_path / "b")[1].model


def test_log_outlives_the_runs_and_a_folder_made_anew_is_another_model(tmp_path: Path) -> None:
    note(run_folder(tmp_path / "a"))
    note(run_folder(tmp_path / "a"), trained=2)
    note(tmp_path / "a", trained=2)
    assert len({one.model for one in Access.load_for_same_rows(tmp_path / "a")}) == 2


def test_identity_of_rows_counts_the_windows_of_a_row_once(tmp_path: Path) -> None:
    texts = [row_as_json(f"t.csv:{place}", part) for place, row in enumerate(ROWS) for part in (row, {})]
    write_rows(tmp_path / "windows", [make_record_batch([{"labels": 1}] * len(texts), texts)])
    assert hash_rows(tmp_path / "windows") == hash_rows(run_folder(tmp_path / "a") / "data" / "test")


def test_torn_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    log = tmp_path / ACCESSES
    note(run_folder(tmp_path / "a"))
    whole = log.read_bytes()
    log.write_bytes(
        b"\xff\xfe\n[1]\n17\n{}\n" + whole + json.dumps({"run": "a", "later": 1}).encode() + b"\n" + whole[:40]
    )
    note(run_folder(tmp_path / "b"), trained=2)
    assert [one.run for one in Access.load_for_same_rows(tmp_path / "b")] == ["a", "b"]


def test_log_that_cannot_be_written_is_said_and_ruins_nothing(tmp_path: Path) -> None:
    (tmp_path / ACCESSES).mkdir()
    events: list[Event] = []
    note(run_folder(tmp_path / "a"), listener=events.append)
    (event,) = events
    assert isinstance(event, Message)
    assert f"{ACCESSES}: cannot be written (is a directory)" in event.text


def _append(path: Path, number: int) -> None:
    for line in range(200):
        append_line(path, {"number": number, "line": line, "long": "x" * 500})


def test_processes_that_append_at_the_same_time_lose_and_mix_no_line(tmp_path: Path) -> None:
    path, context = tmp_path / "log.jsonl", get_context("fork")
    writers = [context.Process(target=_append, args=(path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = read_json_lines(path)
    assert len(path.read_text(encoding="utf-8").splitlines()) == len(lines) == 800
    for number in range(4):
        assert [one["line"] for one in lines if one["number"] == number] == list(range(200))
