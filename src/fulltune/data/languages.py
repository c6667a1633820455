"""Languages of the texts of each column, and which rows are in one that hardly any other row is in.

That is no property of a single text: all rows are looked at before it is known which languages are a column's own. Kept
of each row are six bytes a column; the few rows in question are read again, and looked at more closely.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from fulltune.audit.flaw import listed
from fulltune.audit.language import SURE, elsewhere, knows_languages, name_of, spoken
from fulltune.data.running_text import columns_with_text, whole_texts
from fulltune.records.audit import Languages
from fulltune.records.data import SplitName
from fulltune.tasks import Row

OTHER_LANGUAGE = "other language"
_KNOWN = 0.5
"""Probability from which a text counts as one in a language."""
MAIN = 0.05
"""Share of a column's texts from which a language is one of its own: mixed data is no fault."""
NEARLY_ALL = 0.9
"""Share of a column's texts that is in its own languages, for the rest to stand out."""
LEAST_ROWS = 20


@dataclass(frozen=True)
class Stranger:
    """A row that is in another language than nearly all others of a column."""

    split: SplitName
    row: Row
    column: str
    reason: str
    confidence: float


@dataclass
class Heard:
    """The languages of a column's texts, row by row."""

    numbers: array[int] = field(default_factory=lambda: array("h"))
    """Of each row's language in `codes`; -1: not known. All splits, one after the other."""
    confidences: array[float] = field(default_factory=lambda: array("f"))
    codes: dict[str, int] = field(default_factory=dict)
    ends: dict[SplitName, int] = field(default_factory=dict)
    """Split to the number of rows up to its last one."""

    def add(self, text: str, split: SplitName) -> None:
        """The next row's text."""
        found = spoken(text)
        is_known = found is not None and found.confidence >= _KNOWN
        self.numbers.append(self.codes.setdefault(found.language, len(self.codes)) if found and is_known else -1)
        self.confidences.append(found.confidence if found else 0.0)
        self.ends[split] = len(self.numbers)

    def counts(self) -> Counter[str]:
        """Languages of the rows in which one is known, the most frequent first."""
        return self._of(np.frombuffer(self.numbers, np.int16))

    def own(self) -> set[str]:
        """Languages of enough rows to be the column's own."""
        counts = self.counts()
        return {code for code, count in counts.items() if count >= MAIN * counts.total()}

    def why_not(self) -> str | None:
        """Why no row can stand out; None: rows can."""
        counts = self.counts()
        if counts.total() < LEAST_ROWS:
            return f"fewer than {LEAST_ROWS} texts are long enough to tell their language"
        if sum(counts[code] for code in self.own()) < NEARLY_ALL * counts.total():
            return f"its texts are in {len(counts)} languages, and no few of them are those of nearly all"
        return None

    def suspects(self) -> np.ndarray:
        """Positions of rows that seem to be in none of the column's own languages."""
        numbers, own = np.frombuffer(self.numbers, np.int16), self.own()
        others = np.isin(numbers, [number for code, number in self.codes.items() if code not in own])
        return np.flatnonzero(others & (np.frombuffer(self.confidences, np.float32) >= SURE))

    def about(self, column: str) -> Languages:
        """What is told of the column, split by split."""
        numbers, begin, own = np.frombuffer(self.numbers, np.int16), 0, self.own()
        rows: dict[SplitName, int] = {}
        counts: dict[SplitName, dict[str, int]] = {}
        for split, end in self.ends.items():
            rows[split] = end - begin
            counts[split] = {name_of(code): count for code, count in self._of(numbers[begin:end]).most_common()}
            begin = end
        main = tuple(name_of(code) for code, _ in self.counts().most_common() if code in own)
        return Languages(column=column, main=main, rows=rows, counts=counts)

    def _of(self, numbers: np.ndarray) -> Counter[str]:
        counts = np.bincount(numbers[numbers >= 0], minlength=len(self.codes))
        return Counter({code: int(counts[number]) for code, number in self.codes.items() if counts[number]})


def listen(heard: dict[str, Heard], row: Row, columns: Mapping[str, str], split: SplitName) -> None:
    """Take in the languages of a row's texts, by column; without the extra there is nothing to take in."""
    if not knows_languages():
        return
    texts = whole_texts(row, columns)
    for column in columns_with_text(columns):
        heard.setdefault(column, Heard()).add(texts.get(column, ""), split)


def not_told(heard: Mapping[str, Heard]) -> str | None:
    """Why rows of some columns cannot stand out, by column; None: those of all can."""
    if not knows_languages():
        return "needs the extra 'languages'"
    why = {column: one.why_not() for column, one in heard.items()}
    return "; ".join(f"column '{column}': {said}" for column, said in why.items() if said) or None


def strangers(
    heard: Mapping[str, Heard], columns: Mapping[str, str], rows: Callable[[SplitName], Iterator[Row]]
) -> Iterator[Stranger]:
    """Rows that are surely in another language than nearly all others of their column.

    Args:
        heard: What `listen` took in.
        columns: Role to column.
        rows: Gives the rows of a split once more, in the same order.
    """
    judged = {column: one for column, one in heard.items() if one.why_not() is None}
    suspects = {column: set(one.suspects().tolist()) for column, one in judged.items()}
    if not any(suspects.values()):
        return
    own = {column: judged[column].own() for column in suspects}
    shares = {column: judged[column].about(column) for column in suspects}
    position = 0
    for split in next(iter(heard.values())).ends:
        for row in rows(split):
            for column, text in whole_texts(row, columns).items():
                if position in suspects.get(column, ()) and (found := elsewhere(text, own[column])) is not None:
                    main = listed(list(shares[column].main))
                    reason = f"{name_of(found.language)}, where nearly all rows are {main}"
                    yield Stranger(split, row, column, reason, found.confidence)
            position += 1
