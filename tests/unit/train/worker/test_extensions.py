"""Locks of compilations: waited for while someone holds them, removed when nobody does."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fulltune.errors import SetupError
from fulltune.train.worker import extensions


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    monkeypatch.setattr(extensions, "POLL_SECONDS", 0.02)
    return []


def clear(lock: Path, notes: list[tuple[str, str]]) -> list[str]:
    phases: list[str] = []
    extensions.clear_lock(lock, phases.append, lambda event, detail: notes.append((event, detail)))
    return phases


def test_no_lock_is_nothing_to_do(tmp_path: Path, notes: list[tuple[str, str]]) -> None:
    assert clear(tmp_path / "lock", notes) == []
    assert notes == []


def test_lock_that_nobody_holds_is_removed_and_noted(tmp_path: Path, notes: list[tuple[str, str]]) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    old = time.time() - extensions.QUIET_SECONDS - 1
    os.utime(lock, (old, old))

    assert clear(lock, notes) == []

    assert not lock.exists()
    ((event, detail),) = notes
    assert event == "stale lock removed"
    assert str(lock) in detail


def test_lock_of_a_compilation_that_goes_on_is_waited_for(tmp_path: Path, notes: list[tuple[str, str]]) -> None:
    lock = tmp_path / "lock"
    held = os.open(lock, os.O_CREAT | os.O_EXCL)  # as torch does
    old = time.time() - 10 * extensions.QUIET_SECONDS
    os.utime(lock, (old, old))

    phases: list[str] = []

    def say(phase: str) -> None:
        """Released once it is waited for: how long a look at all processes takes depends on the machine."""
        if not phases:
            lock.unlink()
            os.close(held)
        phases.append(phase)

    extensions.clear_lock(lock, say, lambda event, detail: notes.append((event, detail)))

    assert notes == []
    # A process forked by other tests may share the open file.
    assert [phase.startswith(f"waiting for {lock} (process ") for phase in phases] == [True]


def test_lock_that_stays_names_the_file_and_what_to_do(
    tmp_path: Path, notes: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extensions, "LONGEST_SECONDS", 0.0)
    (tmp_path / "lock").touch()

    with pytest.raises(SetupError, match=r"lock: held by a process that cannot be seen from here .*delete the file"):
        clear(tmp_path / "lock", notes)
    assert (tmp_path / "lock").exists()
