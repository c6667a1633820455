"""Applies a patch file's decisions about single rows each time the data is read. A line's `row` is a hash from
`numbered_row_hash`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fulltune.data.encode import DroppedRow
from fulltune.data.readers.read import LocatedRow
from fulltune.errors import DataError
from fulltune.files import write_text
from fulltune.inference.store import row_id
from fulltune.records.audit import RowDecision
from fulltune.text import counted, first_few

CHECK = "patch"
_SHOWN = 3
Decisions = Mapping[tuple[str, str], RowDecision]


def load_patch(path: Path, setting: str = "data.patch") -> dict[tuple[str, str], RowDecision]:
    """Load a patch file; return a dictionary from (source, row hash) to the last decision on that row. Raises
    `DataError` for bad lines."""
    expected = "expected a patch file written by 'fulltune data RECIPE --review'"
    try:
        # splitlines would also split at characters that a text may contain.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        reason = getattr(error, "strerror", "it is not UTF-8")
        raise DataError(f"{setting}: {path}: cannot be read ({reason}); {expected}") from None
    decisions: dict[tuple[str, str], RowDecision] = {}
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{setting}: {path}:{number}"
        try:
            decision = RowDecision.model_validate(json.loads(line))
        except ValueError as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            detail = f" ({'.'.join(map(str, first['loc']))}: found {first['input']!r:.60})" if first else ""
            problems.append(
                f'{where}: not a decision{detail}; expected {{"row": "...", "remedy": {{"action": "drop"}}}}'
            )
            continue
        remedy = decision.remedy
        if remedy.action == "replace" and (remedy.column is None or isinstance(remedy.value, dict | None)):
            problems.append(f"{where}: 'replace' needs a 'column', and a text, number or list as 'value'; add them")
        decisions[decision.key] = decision
    if problems:
        count = counted(len(problems), "invalid line")
        raise DataError([*problems[:_SHOWN], f"{setting}: {path}: {count}; {expected}"])
    return decisions


def save_patch(path: Path, decisions: Iterable[RowDecision]) -> None:
    lines = (f"{decision.model_dump_json(exclude_defaults=True)}\n" for decision in decisions)
    write_text(path, "".join(lines), private=True)


@dataclass
class PatchedRows:
    """Applies a patch to a source's rows, and records what it changed."""

    decisions: Decisions
    source: str
    matched: set[tuple[str, str]] = field(default_factory=set)
    dropped: list[DroppedRow] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _copies: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.hashes = {row.partition("-")[0] for source, row in self.decisions if source == self.source}

    def rows(self, rows: Iterable[LocatedRow]) -> Iterator[LocatedRow]:
        """Yield the patched rows, omitting those that the patch drops."""
        self.dropped, self.problems, self._copies = [], [], Counter()
        for place, row in rows:
            patched = self._apply_decisions(place, row) if self.hashes else row
            if patched is not None:
                yield place, patched

    def _apply_decisions(self, location: str, row: dict[str, Any]) -> dict[str, Any] | None:
        while (row_hash := row_id(row)) in self.hashes:
            self._copies[row_hash] += 1
            decision = self.decisions.get((self.source, numbered_row_hash(row_hash, self._copies[row_hash])))
            if decision is None:
                break
            self.matched.add(decision.key)
            remedy = decision.remedy
            if remedy.action == "drop":
                reason = f"{decision.check or 'decided'} (data.patch)"
                self.dropped.append(DroppedRow(self.source, location, CHECK, reason, dict(row)))
                return None
            if remedy.action != "replace":
                break
            if remedy.column not in row:
                self.problems.append(
                    f"{location}: no column '{remedy.column}' to replace, expected one of {', '.join(row)}"
                )
                break
            row = {**row, str(remedy.column): remedy.value}
        return row


def numbered_row_hash(row: str, number: int) -> str:
    """Return a row's hash, with `-2`, `-3` ... appended for the second, third ... of equal rows."""
    return row if number == 1 else f"{row}-{number}"


def next_row_hash(times: Counter[tuple[str, str]], key: tuple[str, str], decisions: Decisions) -> str:
    """Return the numbered hash of the next row with this source and hash, counting rows that `decisions` dropped."""
    while True:
        times[key] += 1
        name = numbered_row_hash(key[1], times[key])
        decision = decisions.get((key[0], name))
        if decision is None or decision.remedy.action != "drop":
            return name


def note_on_patch(path: str | None, sources: Iterable[PatchedRows | None]) -> list[str]:
    """Return a note on how many rows a patch dropped and changed, or an empty list without a patch."""
    patched = [source for source in sources if source is not None]
    done = Counter(source.decisions[key].remedy.action for source in patched for key in source.matched)
    return [f"{path}: {counted(done['drop'], 'row')} dropped, {done['replace']:,} changed (data.patch)"] if path else []


def refuse_unmatched_decisions(path: str, sources: Sequence[PatchedRows], all_rows_read: bool) -> None:
    """Raise `DataError` if decisions refer to missing columns or, if `all_rows_read`, to missing rows."""
    decisions = sources[0].decisions
    matched = set[tuple[str, str]]().union(*(source.matched for source in sources))
    problems = [f"data.patch: {path}: {problem}" for source in sources for problem in source.problems][:_SHOWN]
    missing = [decision for decision in decisions.values() if decision.key not in matched]
    if missing and all_rows_read:
        rows = first_few([decision.row for decision in missing], 20)
        problems.append(
            f"data.patch: {path}: {counted(len(missing), 'row')} of the {len(decisions):,} in this patch are not in "
            f"the data ({rows}), because the patch belongs to other files or the files have changed; remove these "
            "lines, or review again: 'fulltune data RECIPE --set data.patch=null --review --patch NEW.jsonl'"
        )
    if problems:
        raise DataError(problems)
