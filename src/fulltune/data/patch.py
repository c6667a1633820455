"""A patch file: what was decided about single rows, applied each time the data is read.

A line is a JSON object with the row's `row` (`inference.store.row_id`: a hash of all its columns), so that a patch
holds wherever the row stands, and never for another row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


def load_patch(path: Path, setting: str = "data.patch") -> dict[str, RowDecision]:
    """The decisions of a patch file, by `row_id`; of several about one row the last one counts.

    Raises:
        DataError: When it cannot be read, with all lines that are no decisions.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{setting}: {path}: cannot be read ({error}); expected a patch file in JSON lines") from None
    found: dict[str, RowDecision] = {}
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            one = RowDecision.model_validate(json.loads(line))
        except ValueError:
            problems.append(
                f"{setting}: {path}:{number}: is no decision; expected "
                '{"row": "...", "remedy": {"action": "drop"}}, as \'fulltune data --review\' writes it'
            )
            continue
        if one.remedy.action == "replace" and one.remedy.column is None:
            problems.append(f"{setting}: {path}:{number}: replaces something, and names no column; add 'column'")
        found[one.row] = one
    if problems:
        raise DataError(problems)
    return found


def save_patch(path: Path, decisions: Iterable[RowDecision]) -> None:
    """Write decisions, a line each."""
    write_text(path, "".join(f"{one.model_dump_json(exclude_defaults=True)}\n" for one in decisions))


@dataclass
class Patched:
    """Rows of a source after a patch; what it did is known when they were read to their end."""

    decisions: Mapping[str, RowDecision]
    split: str
    matched: set[str] = field(default_factory=set)
    dropped: list[Dropped] = field(default_factory=list)

    def rows(self, rows: Iterable[PlacedRow]) -> Iterator[PlacedRow]:
        """The rows, without those that are dropped."""
        self.dropped = []
        for place, row in rows:
            kept = self._decided(place, row)
            if kept is not None:
                yield place, kept

    def _decided(self, place: str, row: dict[str, Any]) -> dict[str, Any] | None:
        """A row as it is kept. One whose text was replaced may be decided about once more, as it is then."""
        seen = set[str]()
        while (decision := self.decisions.get(row_id(row))) is not None and decision.row not in seen:
            seen.add(decision.row)
            self.matched.add(decision.row)
            remedy = decision.remedy
            if remedy.action == "drop":
                reason = f"{decision.check or 'decided'} (data.patch)"
                self.dropped.append(Dropped(self.split, place, CHECK, reason, dict(row)))
                return None
            if remedy.action == "replace" and remedy.column is not None:
                row = {**row, remedy.column: remedy.value}
        return row


def refuse_foreign(path: str, sources: Sequence[Patched]) -> None:
    """A patch for other rows would do nothing, or half of what was decided.

    Args:
        path: Of the patch.
        sources: All of them, read to their end.

    Raises:
        DataError: When it decides about rows that are not there.
    """
    decisions = sources[0].decisions
    matched = set[str]().union(*(source.matched for source in sources))
    missing = [one for one in decisions.values() if one.row not in matched]
    if missing:
        places = first_few([one.place or one.row for one in missing], _SHOWN)
        raise DataError(
            f"data.patch: {path}: {counted(len(missing), 'row')} of {len(decisions):,} that it decides about cannot be "
            f"found in the data ({places}): it belongs to other files, or these were changed since; review the rows "
            "again (fulltune data RECIPE --review), or remove these lines"
        )
