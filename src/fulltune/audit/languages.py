"""Detects the languages of each column (py3langid 0.4), and rows in a rare one."""

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
MIN_BYTES = 20
"""Minimum number of UTF-8 bytes of letters: 20 Latin, 10 Cyrillic or 7 Chinese characters."""
_MAX_CHARACTERS = 400
"""Characters examined, half of them from the text's end."""
_VARIETIES: Mapping[str, str] = PATTERNS["varieties"]
_RELATED = {code: frozenset(family.split()) for family in PATTERNS["families"] for code in family.split()}
_LIKELY = 0.5
MAIN = 0.05
NEARLY_ALL = 0.9
"""Share of texts that the main languages must have before other texts are suspects."""
MIN_ROWS = 20


@cache
def _load_identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def detect_language(text: str) -> tuple[str, float] | None:
    """Return a text's likeliest language and its probability, or None if the text has too few letters."""
    words = _words_to_examine(text)
    return _likeliest_language(words, ()) if _num_letter_bytes(words) >= MIN_BYTES else None


def foreign_language(text: str, main: Collection[str]) -> tuple[str, float] | None:
    """Return a text's language and probability, or None unless its halves and uncapitalised words are all likelier in
    it than in a main language."""
    words = _words_to_examine(text).split()
    language = _likeliest_language(" ".join(words), main) if words else None
    if language is None or language[0] in main or language[1] < SURE:
        return None
    if " ".join(words).isupper():
        words = " ".join(words).lower().split()
    half, plain = len(words) // 2, [word for word in words if word == word.lower()]
    if 2 * _num_letter_bytes(" ".join(plain)) < MIN_BYTES:
        return None
    parts = [plain, words[:half], words[half:]] if half else [plain]
    others = [_likeliest_language(" ".join(part), main) for part in parts]
    return language if all(other is not None and other[0] not in main for other in others) else None


def _words_to_examine(text: str) -> str:
    text = RE["fenced"].sub(" ", text)
    if len(text) > 2 * _MAX_CHARACTERS:
        # The next step seldom removes more than half of a text.
        text = f"{text[:_MAX_CHARACTERS]} {text[-_MAX_CHARACTERS:]}"
    words = " ".join(RE["no_language"].sub(" ", text).split())
    return (
        f"{words[: _MAX_CHARACTERS // 2]} {words[-_MAX_CHARACTERS // 2 :]}" if len(words) > _MAX_CHARACTERS else words
    )


def _num_letter_bytes(words: str) -> int:
    return sum(len(letters.encode("utf-8", "replace")) for letters in RE["letters"].findall(words))


def _likeliest_language(words: str, main: Collection[str]) -> tuple[str, float] | None:
    """Return the likeliest language and its probability, with that of related languages except main ones."""
    shares = Counter[str]()
    for code, share in _load_identifier().rank(words):
        shares[_VARIETIES.get(code, code)] += share
    best = max(shares, key=lambda code: shares[code])
    close = _RELATED.get(best, frozenset()) - set(main) | {best}
    # `zxx` means no language.
    return None if best == "zxx" else (best, sum(shares[code] for code in close))


@dataclass
class ColumnLanguages:
    """Counts the languages of a column's texts."""

    counts: Counter[str] = field(default_factory=Counter)
    """Number of rows in each likely language."""
    confident: array[int] = field(default_factory=lambda: array("h"))
    """Index in `codes` of each row's language, or -1 if unsure."""
    codes: dict[str, int] = field(default_factory=dict)

    def add(self, text: str) -> None:
        code, confidence = detect_language(text) or ("", 0.0)
        if confidence >= _LIKELY:
            self.counts[code] += 1
        self.confident.append(self.codes.setdefault(code, len(self.codes)) if confidence >= SURE else -1)

    def main_languages(self) -> list[str]:
        return [code for code, count in self.counts.most_common() if count >= MAIN * self.counts.total()]

    def obstacle(self) -> str | None:
        """Return why rows in an unexpected language cannot be flagged in this column, or None if they can."""
        if self.counts.total() < MIN_ROWS:
            return f"fewer than {MIN_ROWS} texts are long enough to detect their language"
        if sum(self.counts[code] for code in self.main_languages()) < NEARLY_ALL * self.counts.total():
            return f"its texts are in {len(self.counts)} languages, and the main ones cover too few of them"
        return None

    def suspects(self) -> set[int]:
        """Return the positions of rows that seem to be in none of the main languages."""
        if self.obstacle() is not None:
            return set()
        others = [number for code, number in self.codes.items() if code not in self.main_languages()]
        return {*np.flatnonzero(np.isin(np.frombuffer(self.confident, np.int16), others)).tolist()}


def add_languages(languages: dict[str, ColumnLanguages], row: Row, columns: Mapping[str, str]) -> None:
    """Add the languages of a row's texts by column, if the extra is installed."""
    if not is_installed(PACKAGE):
        return
    for column, text in whole_texts(row, columns).items():
        languages.setdefault(column, ColumnLanguages()).add(text)


def languages_obstacle(languages: Mapping[str, ColumnLanguages]) -> str | None:
    """Return why rows in an unexpected language cannot be flagged in some columns, or None if they can."""
    if not is_installed(PACKAGE):
        return "needs the extra 'languages'"
    reasons = {column: column_languages.obstacle() for column, column_languages in languages.items()}
    return "; ".join(f"column '{column}': {reason}" for column, reason in reasons.items() if reason) or None
