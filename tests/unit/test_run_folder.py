"""What a run folder keeps of the command itself."""

from __future__ import annotations

import time
from pathlib import Path

from fulltune import run_folder
from fulltune.records import Command


def test_seconds_of_a_command_are_kept_where_it_did_everything(tmp_path: Path) -> None:
    began = time.time() - 5
    for place in ("attempts/full-seed42-01/request.json", "scores/full-seed42.json"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text("{}", encoding="utf-8")
    run_folder.note_command(tmp_path, began)
    seconds = Command.load(tmp_path / run_folder.COMMAND).seconds
    assert seconds >= 5
    # A later one found the training done.
    run_folder.note_command(tmp_path, time.time() + 60)
    assert Command.load(tmp_path / run_folder.COMMAND).seconds == seconds


def test_seconds_of_a_command_that_scored_no_trained_model_are_not_kept(tmp_path: Path) -> None:
    attempt = tmp_path / "attempts" / "full-seed42-01"
    attempt.mkdir(parents=True)
    (attempt / "request.json").write_text("{}", encoding="utf-8")
    run_folder.note_command(tmp_path, time.time() - 5)
    assert not (tmp_path / run_folder.COMMAND).exists()
