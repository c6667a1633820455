"""Write a file so that a reader sees the old one or the new one."""

from __future__ import annotations

from pathlib import Path

from fulltune.report.format import words


def replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(words.harmless(text), encoding="utf-8")
    part.replace(path)
