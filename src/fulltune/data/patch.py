"""A patch file: what was decided about single rows, applied each time the data is read.

A line is a JSON object with the row's `row` (`inference.store.row_id`: a hash of all its columns), so that a patch
holds wherever the row stands, and never for another row. Of equal rows the second one has `-2` behind its hash, and so
on; equal rows of another split's own file are others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fulltune.data.encode import Dropped
from fulltune.data.readers.read import PlacedRow
from fulltune.errors import DataError
from fulltune.files import write_text
from fulltune.inference.store import row_id
from fulltune.records.audit import RowDecision
from fulltune.text import counted, first_few

CHECK = "patch"
"""Of rows that a patch drops, in `dropped.jsonl`."""
_SHOWN = 3
Decisions = Mapping[tuple[str, str], RowDecision]
"""By what they are about: `RowDecision.key`."""


def load_patch(path: Path, setting: str = "data.patch") -> dict[tuple[str, str], RowDecision]:
    """The decisions of a patch file, the last one about a row; raises a `DataError` with the first bad lines."""
    expected = "expected a patch file, as 'fulltune data RECIPE --review' writes it"
    try:
        # Not splitlines: a text may have other signs that end a line.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        reason = getattr(error, "strerror", "it is not UTF-8")
        raise DataError(f"{setting}: {path}: cannot be read ({reason}); {expected}") from None
    found: dict[tuple[str, str], RowDecision] = {}
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{setting}: {path}:{number}"
        try:
            one = RowDecision.model_validate(json.loads(line))
        except ValueError as error:
            first: Any = error.errors()[0] if isinstance(error, ValidationError) else None
            said = f" ({'.'.join(map(str, first['loc']))}: found {first['input']!r:.60})" if first else ""
            problems.append(f'{where}: is no decision{said}; expected {{"row": "...", "remedy": {{"action": "drop"}}}}')
            continue
        is_cell = one.remedy.value is not None and not isinstance(one.remedy.value, dict)
        if one.remedy.action == "replace" and (one.remedy.column is None or not is_cell):
            problems.append(f"{where}: replaces something; expected 'column', and a text, number or list as 'value'")
        found[one.key] = one
    if problems:
        raise DataError([*problems[:_SHOWN], f"{setting}: {path}: {counted(len(problems), 'such line')}; {expected}"])
    return found


def save_patch(path: Path, decisions: Iterable[RowDecision]) -> None:
    """Write decisions, a line each."""
    write_text(path, "".join(f"{one.model_dump_json(exclude_defaults=True)}\n" for one in decisions), private=True)


@dataclass
class Patched:
    """Rows of a source after a patch; what it did is known when they were read to their end."""

    decisions: Decisions
    source: str
    matched: set[tuple[str, str]] = field(default_factory=set)
    dropped: list[Dropped] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _seen: Counter[str] = field(default_factory=Counter)
    """How often each row that is decided about has come so far."""

    def __post_init__(self) -> None:
        self.hashes = {row.partition("-")[0] for source, row in self.decisions if source == self.source}

    def rows(self, rows: Iterable[PlacedRow]) -> Iterator[PlacedRow]:
        """The rows, without those that are dropped."""
        self.dropped, self.problems, self._seen = [], [], Counter()
        for place, row in rows:
            kept = self._decided(place, row) if self.hashes else row
            if kept is not None:
                yield place, kept

    def _decided(self, place: str, row: dict[str, Any]) -> dict[str, Any] | None:
        """A row as it is kept. One whose text was replaced may be decided about once more, as it is then."""
        while (found := row_id(row)) in self.hashes:
            self._seen[found] += 1
            decision = self.decisions.get((self.source, numbered(found, self._seen[found])))
            if decision is None:
                break
            self.matched.add(decision.key)
            remedy = decision.remedy
            if remedy.action == "drop":
                reason = f"{decision.check or 'decided'} (data.patch)"
                self.dropped.append(Dropped(self.source, place, CHECK, reason, dict(row)))
                return None
            if remedy.action != "replace":
                break
            if remedy.column not in row:
                self.problems.append(f"{place}: column '{remedy.column}' is to be replaced, expected {', '.join(row)}")
                break
            row = {**row, str(remedy.column): remedy.value}
        return row


def numbered(row: str, number: int) -> str:
    """The hash of a row, and which one of several equal ones it is, from 1."""
    return row if number == 1 else f"{row}-{number}"


def patched_in_words(path: str | None, sources: Iterable[Patched | None]) -> list[str]:
    """What a patch did, once the rows were read; empty without one."""
    done = Counter(one.decisions[key].remedy.action for one in sources if one is not None for key in one.matched)
    return (
        [f"{path}: {counted(done['drop'], 'row')} left out, {done['replace']:,} changed (data.patch)"] if path else []
    )


def refuse_foreign(path: str, sources: Sequence[Patched], is_whole: bool) -> None:
    """Raises a `DataError` for decisions about rows that are not there, if all were read, or columns that they lack."""
    decisions = sources[0].decisions
    matched = set[tuple[str, str]]().union(*(source.matched for source in sources))
    problems = [f"data.patch: {path}: {problem}" for source in sources for problem in source.problems][:_SHOWN]
    missing = [one for one in decisions.values() if one.key not in matched]
    if missing and is_whole:
        problems.append(
            f"data.patch: {path}: {counted(len(missing), 'row')} of {len(decisions):,} that it decides about cannot be "
            f"found in the data ({first_few([one.row for one in missing], 20)}): it belongs to other files, or these "
            "were changed since; remove these lines, or decide anew: 'fulltune data RECIPE --set data.patch=null "
            "--review --patch NEW.jsonl'"
        )
    if problems:
        raise DataError(problems)
