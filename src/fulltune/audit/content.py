"""Texts that say nothing, or the same again and again."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from fulltune.audit.flaw import Flaw, quoted
from fulltune.text import format_percent

_BLANK_SIGNS = "\u115f\u1160\u2800\u3164\uffa0"
"""Fillers of Korean, and braille without a dot: letters and signs by their category, and nothing to see."""
_SEEN = re.compile(rf"[^\W_{_BLANK_SIGNS}]")
_TWO_LETTERS = re.compile(r"[^\W\d_][\W\d_]*[^\W\d_]")


def empty(text: str) -> Flaw | None:
    """Nothing that one could see."""
    if _SEEN.search(text) or any(unicodedata.category(one)[0] not in "CZ" for one in text if one not in _BLANK_SIGNS):
        return None
    return Flaw("empty", "nothing but blanks" if text else "no text")


def no_words(text: str) -> Flaw | None:
    """Fewer than two letters and no emoji; a sign of Chinese or Japanese is a word by itself. Empty ones aside."""
    if _TWO_LETTERS.search(text):
        return None
    kinds = Counter(map(unicodedata.category, text))
    if kinds["Lo"] or kinds["So"]:
        return None
    seen = text.strip()
    if not seen or all(kind[0] in "CZ" for kind in kinds):
        return None
    letters = sum(count for kind, count in kinds.items() if kind[0] == "L")
    return Flaw("no words", f"only one letter: {quoted(seen)}" if letters else f"no letter: {quoted(seen)}")


# ---- repetition -------------------------------------------------------------------------------------------------

_RUN = re.compile(r"(.)\1\1\1\1\1")
"""What is asked first: five times as fast as with letters alone."""
_SAME_CHARACTER = re.compile(r"([^\W\d_])\1{5,}")
_SAME_PIECE = re.compile(r"([^\W\d_](?:[^\W\d_]|[,.!?，。！？、]){1,19}?)\1{4,}")
_WORD = re.compile(r"[^\W_]+")
STRESSED, LONGEST_STRESSED = 20, 30
"""So many letters of one kind people type to stress a word: fewer in a text of little else, and at most in any."""
LEAST_WORDS = 8
MOST_REPEATED = 0.5
"""Share of a text that may repeat itself."""
_TIMES = 5


def repetition(text: str) -> Flaw | None:
    """One character, word or phrase at least five times in a row, over half of the text or more than 100 words of it;
    or a text of eight words or more twice.

    Lines of dashes, tables and numbers are layout: letters alone count.
    """
    return _same_character(text) or _same_words(text)


def _same_character(text: str) -> Flaw | None:
    found = _SAME_CHARACTER.search(text) if _RUN.search(text) else None
    if found is None and len(text) >= 20 and " " not in text[:60]:
        # Without blanks, as in Chinese or in a broken export.
        found = _SAME_PIECE.search(text)
    if found is None:
        return None
    size, letters = len(found[0]), sum(map(str.isalpha, text))
    if size < letters and (size < STRESSED or (size < LONGEST_STRESSED and size < MOST_REPEATED * letters)):
        return None
    return Flaw("repetition", f"'{found[1]}' {size // len(found[1])} times in a row")


def _same_words(text: str) -> Flaw | None:
    rough = text.split()
    if len(rough) < LEAST_WORDS or (len(set(rough)) > len(rough) * 0.8 and len(rough) < 100):
        return None
    words = _WORD.findall(text.lower())
    period, stretch, end = _longest_loop(words, 3)
    if stretch < _TIMES * period and len(set(words)) <= MOST_REPEATED * len(words):
        # Within what is repeated, three words may stand twice.
        period, stretch, end = _longest_loop(words, LEAST_WORDS)
    is_whole = stretch == len(words) and LEAST_WORDS <= period <= stretch // 2
    if not is_whole and (stretch < LEAST_WORDS or stretch < _TIMES * period):
        return None
    if stretch < MOST_REPEATED * len(words) and stretch < 100:
        return None
    phrase = " ".join(words[end - period : end])
    if not any(map(str.isalpha, phrase)):
        return None
    share = format_percent(stretch / len(words))
    return Flaw("repetition", f"{quoted(phrase)} {stretch // period} times in a row, {share} of the words")


def _longest_loop(words: list[str], size: int) -> tuple[int, int, int]:
    """Period, length and end of the longest stretch whose runs of words come again after as many words, in one pass."""
    last = dict[tuple[str, ...], int]()
    best, period, start = (1, 0, 0), 0, 0
    for place in range(len(words) - size + 1):
        gram = tuple(words[place : place + size])
        ago = place - last.get(gram, place)
        last[gram] = place
        if ago == 0 or ago != period:
            period, start = ago, place
        if period and (stretch := place + size - start + period) > best[1]:
            best = (period, stretch, place + size)
    return best
