from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from fulltune.audit.texts import join_texts_by_column
from fulltune.audit.texts.flaw import PATTERNS, RE, is_installed
from fulltune.tasks import Row

OTHER_LANGUAGE, PACKAGE = "other language", "py3langid"
MIN_PROBABILITY = 0.95
MIN_BYTES = 20
"""Minimum UTF-8 bytes of letters: 20 Latin, 10 Cyrillic or 7 Chinese characters."""
_MAX_CHARACTERS = 400
_VARIETIES: Mapping[str, str] = PATTERNS["varieties"]
_RELATED = {code: frozenset(family.split()) for family in PATTERNS["families"] for code in family.split()}
_LIKELY = 0.5
MAIN = 0.05
MIN_MAIN_SHARE = 0.9
MIN_ROWS = 20


@cache
def _load_identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def detect_language(text: str) -> tuple[str, float] | None:
    """Return a text's likeliest language and its probability, or None if the text has too few letters."""
    words = _select_words_to_examine(text)
    return _likeliest_language(words, ()) if _num_letter_bytes(words) >= MIN_BYTES else None


def detect_foreign_language(text: str, main_languages: Collection[str]) -> tuple[str, float] | None:
    """Return a text's language and probability if the text is certainly in none of the main languages, else None.

    Both halves and the uncapitalised words must be likelier in another language.
    """
    words = _select_words_to_examine(text).split()
    language = _likeliest_language(" ".join(words), main_languages) if words else None
    if language is None or language[0] in main_languages or language[1] < MIN_PROBABILITY:
        return None
    if " ".join(words).isupper():
        words = " ".join(words).lower().split()
    half, plain = len(words) // 2, [word for word in words if word == word.lower()]
    if 2 * _num_letter_bytes(" ".join(plain)) < MIN_BYTES:
        return None
    parts = [plain, words[:half], words[half:]] if half else [plain]
    others = [_likeliest_language(" ".join(part), main_languages) for part in parts]
    return language if all(other is not None and other[0] not in main_languages for other in others) else None


def _select_words_to_examine(text: str) -> str:
    """Return words from the beginning and end of a text, without code and URLs."""
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


def _likeliest_language(words: str, main_languages: Collection[str]) -> tuple[str, float] | None:
    """Return the likeliest language and its probability, or None if the words are in no language.

    The probabilities of related languages are added, except those of other main languages.
    """
    shares = Counter[str]()
    for code, share in _load_identifier().rank(words):
        shares[_VARIETIES.get(code, code)] += share
    best = max(shares, key=lambda code: shares[code])
    close = _RELATED.get(best, frozenset()) - set(main_languages) | {best}
    # `zxx` means no language.
    return None if best == "zxx" else (best, sum(shares[code] for code in close))


@dataclass
class ColumnLanguages:
    """Counts the languages of a column's texts."""

    counts: Counter[str] = field(default_factory=Counter)
    confident: array[int] = field(default_factory=lambda: array("h"))
    """Index in `codes` of each row's language, or -1 if uncertain."""
    codes: dict[str, int] = field(default_factory=dict)

    def add(self, text: str) -> None:
        code, confidence = detect_language(text) or ("", 0.0)
        if confidence >= _LIKELY:
            self.counts[code] += 1
        self.confident.append(self.codes.setdefault(code, len(self.codes)) if confidence >= MIN_PROBABILITY else -1)

    def main_languages(self) -> list[str]:
        return [code for code, count in self.counts.most_common() if count >= MAIN * self.counts.total()]

    def why_unchecked(self) -> str | None:
        """Return why rows in a rare language cannot be found in this column, or None if they can."""
        if self.counts.total() < MIN_ROWS:
            return f"fewer than {MIN_ROWS} texts are long enough to detect their language"
        if sum(self.counts[code] for code in self.main_languages()) < MIN_MAIN_SHARE * self.counts.total():
            return f"its texts are in {len(self.counts)} languages, and too few are in the main ones"
        return None

    def suspects(self) -> set[int]:
        """Return the positions of rows that seem to be in none of the main languages."""
        if self.why_unchecked() is not None:
            return set()
        others = [number for code, number in self.codes.items() if code not in self.main_languages()]
        return {*np.flatnonzero(np.isin(np.frombuffer(self.confident, np.int16), others)).tolist()}


def add_languages(languages: dict[str, ColumnLanguages], row: Row, columns: Mapping[str, str]) -> None:
    """Detect and count the language of a row's text in each column, if py3langid is installed. Updates `languages`."""
    if not is_installed(PACKAGE):
        return
    for column, text in join_texts_by_column(row, columns).items():
        languages.setdefault(column, ColumnLanguages()).add(text)


def why_languages_unchecked(languages: Mapping[str, ColumnLanguages]) -> str | None:
    """Return why rows in a rare language cannot be found in some columns, or None if they can."""
    if not is_installed(PACKAGE):
        return "needs the extra 'languages'"
    reasons = {column: column_languages.why_unchecked() for column, column_languages in languages.items()}
    return "; ".join(f"column '{column}': {reason}" for column, reason in reasons.items() if reason) or None
