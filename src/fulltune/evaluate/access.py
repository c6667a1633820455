"""The log of who scored which test rows: it lies beside the runs, so that it outlives the one that was deleted."""

from __future__ import annotations

import hashlib
from datetime import datetime
from pathlib import Path

from fulltune.files import append_line
from fulltune.inference.store import rows_id
from fulltune.records.events import Listener, Warned
from fulltune.records.run import ACCESSES, Access
from fulltune.records.training import Outcome


def note(
    folder: Path, listener: Listener, *, trial: str, outcome: Outcome | None, metric: str, value: float | None
) -> None:
    """Write down that a run folder's test rows were scored; where that cannot be written, only the listener hears it.

    Args:
        folder: The run folder, or a comparison's.
        listener: Told when the log cannot be written.
        trial: What was scored.
        outcome: Of its training; None: of a comparison.
        metric: The main metric.
        value: What it came to.
    """
    folder = folder.resolve()
    access = Access(
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        run=folder.name,
        trial=trial,
        model="" if outcome is None else hashlib.sha256(outcome.model_dump_json().encode()).hexdigest()[:16],
        rows=rows_id(folder / "data" / "test"),
        metric=metric,
        value=value,
    )
    try:
        append_line(folder.parent / ACCESSES, access.model_dump(mode="json"))
    except OSError as error:
        reason = str(error.strerror or error).lower()
        text = f"{folder.parent / ACCESSES}: cannot be written ({reason}), so later runs will not count this scoring"
        listener(Warned(text=text))
