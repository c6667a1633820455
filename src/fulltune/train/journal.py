"""What happened in an attempt, for people: things that happen rarely."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path


class Journal:
    """Things that happen rarely, one JSON line each: `journal.jsonl`."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def write(self, event: str, detail: str) -> None:
        if self.path is None:  # not the first process
            return
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, "detail": detail}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
