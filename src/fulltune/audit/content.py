"""Texts that say nothing, or the same again and again, or that a model declined to write."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from fulltune.audit.flaw import Flaw, quoted
from fulltune.text import format_percent

_SEEN = re.compile(r"[^\W_]")
_TWO_LETTERS = re.compile(r"[^\W\d_][\W\d_]*[^\W\d_]")


def empty(text: str) -> Flaw | None:
    """Nothing that one could see."""
    if _SEEN.search(text) or any(unicodedata.category(one)[0] not in "CZ" for one in text):
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
_SAME_PIECE = re.compile(r"([^\W\d_]{2,20}?)\1{4,}")
_WORD = re.compile(r"[^\W_]+")
STRESSED, LONGEST_STRESSED = 20, 30
"""So many letters of one kind people type to stress a word: fewer in a text of little else, and at most in any."""
LEAST_WORDS = 8
MOST_REPEATED = 0.5
"""Share of a text that may repeat itself."""
_TIMES = 5


def repetition(text: str) -> Flaw | None:
    """One character, word or phrase at least five times in a row, over half of the text or more than 100 words of it.

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
    period, stretch, end = _longest_loop(words)
    if stretch < LEAST_WORDS or stretch < _TIMES * period:
        return None
    if stretch < MOST_REPEATED * len(words) and stretch < 100:
        return None
    phrase = " ".join(words[end - period : end])
    if not any(map(str.isalpha, phrase)):
        return None
    share = format_percent(stretch / len(words))
    return Flaw("repetition", f"{quoted(phrase)} {stretch // period} times in a row, {share} of the words")


def _longest_loop(words: list[str]) -> tuple[int, int, int]:
    """Period, length and end of the longest stretch whose words come again after as many words, in one pass."""
    last = dict[tuple[str, ...], int]()
    best, period, start = (1, 0, 0), 0, 0
    for place in range(len(words) - 2):
        gram = tuple(words[place : place + 3])
        ago = place - last.get(gram, place)
        last[gram] = place
        if ago == 0 or ago != period:
            period, start = ago, place
        if period and (stretch := place + 3 - start + period) > best[1]:
            best = (period, stretch, place + 3)
    return best


# ---- refusals ---------------------------------------------------------------------------------------------------

_SIGNS = (
    *(
        "as an ai",
        "as an art",
        "as an l",
        "as a l",
        "as a v",
        "as of my",
        "an ai",
        "sorry",
        "apolog",
        "cannot",
        "can't",
    ),
    *("can not", "unable", "not able", "programmed", "openai's", "my knowledge cut", "my training cut"),
    *("als ki", "als künst", "en tant qu", "como modelo", "como uma ia", "como una ia"),
)
"""One of them stands in each phrase below: looking for these first takes a tenth of the time."""
_WHAT = (
    r"(?:assist|help you|help with|fulfill?|comply|provide|create|generate|write|answer|engage|do that|support|discuss)"
)
_NOT = r"(?:cannot|can't|can not|am unable to|am not able to|won't be able to|am not programmed to)"
_REFUSAL = re.compile(
    r"\bas an? (?:ai\b|artificial intelligence|(?:large )?language model|virtual assistant)"
    r"|\bi(?:'m| am) (?:just |only |merely )?an ai\b"
    r"|\b(?:sorry|apologi[sz]e|apologies),? (?:but |that )?i " + _NOT + " (?:\\w+ )?" + _WHAT + r"\b"
    r"|\A\W*i " + _NOT + r" (?:\w+ )?(?:assist|help you|help with|fulfill?|comply|engage)\b"
    r"|\bmy (?:knowledge|training) cut-?off|\bopenai's (?:content|use|usage) polic"
    r"|\bas of my last (?:knowledge )?(?:update|training)"
    r"|\bals (?:ki|künstliche intelligenz)\b|\ben tant qu(?:e modèle de langage|'ia\b)"
    r"|\bcomo (?:modelo de lenguaje|modelo de linguagem|una ia\b|uma ia\b)"
)


def refusal(text: str) -> Flaw | None:
    """An answer in which an assistant declines or speaks of itself, in English and a few phrases of other languages."""
    lowered = text.lower().replace("’", "'")
    if not any(sign in lowered for sign in _SIGNS):
        return None
    found = _REFUSAL.search(lowered)
    return Flaw("refusal", f"an assistant's own words: {quoted(lowered[found.start() :], 60)}") if found else None
