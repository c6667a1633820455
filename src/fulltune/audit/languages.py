"""Languages of the texts of each column, by py3langid 0.4, and rows in one that hardly any other row is in."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from fulltune.audit.texts import whole_texts
from fulltune.audit.texts.flaw import PATTERNS, RE, is_installed
from fulltune.tasks import Row

OTHER_LANGUAGE, PACKAGE = "other language", "py3langid"
SURE = 0.95
"""Probability from which a text is said to be in another language."""
MIN_BYTES = 20
"""Bytes of letters in UTF-8 that tell a language: 20 Latin letters, 10 Cyrillic ones, 7 Chinese signs."""
_LOOK = 400
"""Characters that are looked at, half of them at the text's beginning and half at its end."""
_SAME: Mapping[str, str] = PATTERNS["varieties"]
_CLOSE = {code: frozenset(family.split()) for family in PATTERNS["families"] for code in family.split()}
_KNOWN = 0.5
"""Probability from which a text counts as one in a language."""
MAIN = 0.05
"""Share of a column's texts from which a language is one of its own: mixed data is no fault."""
NEARLY_ALL = 0.9
"""Share of a column's texts that is in its own languages, for the rest to stand out."""
MIN_ROWS = 20


@cache
def _identifier() -> Any:
    """Loaded once a process, when the first text is looked at."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def detect_language(text: str) -> tuple[str, float] | None:
    """The code of a text's likeliest language and its probability; None: it has too few words that are of any."""
    words = _words(text)
    return _likeliest(words, ()) if _num_bytes(words) >= MIN_BYTES else None


def elsewhere(text: str, main: Collection[str]) -> tuple[str, float] | None:
    """The language of a text if both halves and its uncapitalised words are likelier in it than in its column's."""
    words = _words(text).split()
    found = _likeliest(" ".join(words), main) if words else None
    if found is None or found[0] in main or found[1] < SURE:
        return None
    if " ".join(words).isupper():
        words = " ".join(words).lower().split()
    half, plain = len(words) // 2, [word for word in words if word == word.lower()]
    if 2 * _num_bytes(" ".join(plain)) < MIN_BYTES:
        return None
    parts = [plain, words[:half], words[half:]] if half else [plain]
    others = [_likeliest(" ".join(part), main) for part in parts]
    return found if all(other is not None and other[0] not in main for other in others) else None


def _words(text: str) -> str:
    """What of a text is of a language, on one line."""
    text = RE["fenced"].sub(" ", text)
    if len(text) > 2 * _LOOK:
        # What is put aside is seldom more than half of a text.
        text = f"{text[:_LOOK]} {text[-_LOOK:]}"
    words = " ".join(RE["no_language"].sub(" ", text).split())
    return f"{words[: _LOOK // 2]} {words[-_LOOK // 2 :]}" if len(words) > _LOOK else words


def _num_bytes(words: str) -> int:
    return sum(len(letters.encode("utf-8", "replace")) for letters in RE["letters"].findall(words))


def _likeliest(words: str, main: Collection[str]) -> tuple[str, float] | None:
    """The likeliest language, with the probability of it and those close to it but for the main ones."""
    shares = Counter[str]()
    for code, share in _identifier().rank(words):
        shares[_SAME.get(code, code)] += share
    best = max(shares, key=lambda code: shares[code])
    close = _CLOSE.get(best, frozenset()) - set(main) | {best}
    # What is no language has a class of its own.
    return None if best == "zxx" else (best, sum(shares[code] for code in close))


@dataclass
class ColumnLanguages:
    """The languages of a column's texts, row by row."""

    counts: Counter[str] = field(default_factory=Counter)
    """Languages of the rows in which one is known."""
    sure: array[int] = field(default_factory=lambda: array("h"))
    """Of each row's language in `codes`; -1: not surely known. All splits, one after the other."""
    codes: dict[str, int] = field(default_factory=dict)

    def add(self, text: str) -> None:
        """The next row's text."""
        code, confidence = detect_language(text) or ("", 0.0)
        if confidence >= _KNOWN:
            self.counts[code] += 1
        self.sure.append(self.codes.setdefault(code, len(self.codes)) if confidence >= SURE else -1)

    def own(self) -> list[str]:
        """Languages of enough rows to be the column's own, the most frequent first."""
        return [code for code, count in self.counts.most_common() if count >= MAIN * self.counts.total()]

    def why_not(self) -> str | None:
        """Why no row can stand out; None: rows can."""
        if self.counts.total() < MIN_ROWS:
            return f"fewer than {MIN_ROWS} texts are long enough to tell their language"
        if sum(self.counts[code] for code in self.own()) < NEARLY_ALL * self.counts.total():
            return f"its texts are in {len(self.counts)} languages, and no few of them are those of nearly all"
        return None

    def suspects(self) -> set[int]:
        """Positions of rows that seem to be in none of the column's own languages; empty where none can stand out."""
        if self.why_not() is not None:
            return set()
        others = [number for code, number in self.codes.items() if code not in self.own()]
        return {*np.flatnonzero(np.isin(np.frombuffer(self.sure, np.int16), others)).tolist()}


def add_languages(heard: dict[str, ColumnLanguages], row: Row, columns: Mapping[str, str]) -> None:
    """Take in the languages of a row's texts, by column; without the extra there is nothing to take in."""
    if not is_installed(PACKAGE):
        return
    for column, text in whole_texts(row, columns).items():
        heard.setdefault(column, ColumnLanguages()).add(text)


def not_told(heard: Mapping[str, ColumnLanguages]) -> str | None:
    """Why rows of some columns cannot stand out, by column; None: those of all can."""
    if not is_installed(PACKAGE):
        return "needs the extra 'languages'"
    why = {column: one.why_not() for column, one in heard.items()}
    return "; ".join(f"column '{column}': {said}" for column, said in why.items() if said) or None
