"""Texts that have nothing to do with the task: a file of the user's, or the standard library's documentation."""

from __future__ import annotations

import ast
import hashlib
import math
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from fulltune.errors import DataError
from fulltune.forgetting.budget import LEAST_READ, MOST_READ, MOST_REPLAYED, TOKENS_READ
from fulltune.inference.run import GenericText
from fulltune.recipe.model import AUTO, BUNDLED, PreserveBlock
from fulltune.records.forgetting import Drift
from fulltune.tasks.columns import normalised
from fulltune.text import counted

NUM_TEXTS = 200
MOST_LINES = 30
"""Of a paragraph, on average."""
_BEGINNING, _BOILERPLATE = 64, 8
"""Words by which texts differ: a model reads no more of one; documentation that begins alike goes on alike."""
_WORDS = (20, 120)
_READ_WORDS = 48
"""Of a text, at most: it is cut at 64 tokens, and a word has four thirds of one."""
_WORD_BYTES = 6
_LEFT_OUT = ("test", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "__pycache__")


def generic_texts(
    file: str | None = None, count: int = NUM_TEXTS, setting: str = "preserve.probe"
) -> tuple[list[str], str]:
    """At most `count` texts of a file (None: the standard library's documentation), always alike, and their source."""
    if file is None:
        return _in_drawn_order(_documentation(count))[:count], BUNDLED
    if file.endswith((".json", ".jsonl", ".csv", ".parquet")):
        raise DataError(
            f"{setting}: {file}: expected plain text, a line or a paragraph each; write the texts into a .txt file"
        )
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{setting}: {file}: is not UTF-8, expected a text file; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{setting}: {file}: cannot be read ({error.strerror}); expected a text file") from None
    lines = [line for line in text.splitlines() if line.strip()]
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    # A blank line here and there makes no paragraphs of a list of lines.
    wrapped = len(paragraphs) > 1 and len(lines) <= MOST_LINES * len(paragraphs)
    found = _in_drawn_order(" ".join(part.split()) for part in (paragraphs if wrapped else lines))[:count]
    if len(found) < 2:
        kind = "paragraph" if wrapped else "line"
        raise DataError(
            f"{setting}: {file}: holds {counted(len(found), kind)}; expected at least 2 different lines or paragraphs"
        )
    return found, file


@dataclass(frozen=True)
class Parts:
    """Generic texts of a run with a budget; no text is in two of them."""

    choosing: list[str]
    """Read all along: they steer the training, and choose among its points."""
    sealed: list[str]
    """Read once, at the end."""
    replayed: list[str]
    """Of which each step has some; empty where there is no replay, and where the model writes the texts."""
    source: str
    """Where they come from, without those that are replayed where these have a file of their own."""


def parts(block: PreserveBlock) -> Parts:
    """Share out the texts of a run with a budget, always alike."""
    shares_one = block.replay == AUTO
    texts, source = generic_texts(block.probe, 2 * MOST_READ + MOST_REPLAYED * shares_one)
    each = min(MOST_READ, enough(texts, TOKENS_READ), len(texts) // (3 if shares_one else 2))
    if each < LEAST_READ:
        needed = LEAST_READ * (3 if shares_one else 2)
        use = f"{LEAST_READ} for selection, {LEAST_READ} sealed" + f", {LEAST_READ} for replay" * shares_one
        raise DataError(
            f"preserve.probe: {source}: holds {len(texts):,} texts; a budget takes at least {needed} ({use}): add "
            "lines or paragraphs"
        )
    replayed = texts[2 * each :][:MOST_REPLAYED]
    if not shares_one:
        taken = set(map(beginning, texts))
        found = generic_texts(block.replay, MOST_REPLAYED, "preserve.replay")[0] if block.replay else []
        replayed = [text for text in found if beginning(text) not in taken]
        if block.replay and not replayed:
            raise DataError(f"preserve.replay: {block.replay}: holds nothing but texts of the probe; name other texts")
    return Parts(texts[:each], texts[each : 2 * each], replayed, source)


def enough(texts: Sequence[str], tokens: int) -> int:
    """How many of the texts, from the first on, hold about so many tokens as they are read."""
    # Where words are not set apart, or letters take several bytes, there are more tokens than words.
    sizes = (max(len(text.split()), len(text.encode()) // _WORD_BYTES) for text in texts)
    words = accumulate(min(size, _READ_WORDS) for size in sizes)
    return sum(so_far <= tokens * 3 // 4 for so_far in words)


def check_texts(block: PreserveBlock) -> None:
    """Reject unusable probe files before training."""
    if block.budget is not None:
        parts(block)
    elif block.probe is not None:
        generic_texts(block.probe)


def _in_drawn_order(texts: Iterable[str]) -> list[str]:
    """Different texts, in an order that says nothing about them."""
    different = {beginning(text): text for text in texts if text}
    return sorted(different.values(), key=lambda text: hashlib.sha256(text.encode()).digest())


def beginning(text: str, words: int = _BEGINNING) -> str:
    """The words by which a text is told from others; a model reads no more of it."""
    return " ".join(normalised(text).split()[:words])


@cache
def _documentation(count: int) -> tuple[str, ...]:
    """Paragraphs of so many of the standard library's modules, in an order that says nothing about them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = (path.relative_to(root) for path in (*root.glob("*.py"), *root.glob("*/*.py")))
    wanted = [path for path in modules if not any(part in _LEFT_OUT for part in path.parts)]
    found: dict[str, str] = {}
    for path in sorted(wanted, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest()):
        if len(found) >= count:
            break
        for text in _paragraphs(root / path):
            found.setdefault(beginning(text, _BOILERPLATE), text)
    return tuple(found.values())


def _paragraphs(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                text = " ".join(paragraph.split())
                letters = sum(character.isalpha() or character == " " for character in text)
                if _WORDS[0] <= len(text.split(" ")) <= _WORDS[1] and letters > 0.9 * len(text):
                    yield text


# ---- how far a model has moved away on them ----------------------------------------------------------------------


NEAR_CHANCE, MOST_UNKNOWN = 0.8, 0.3


def says_little(text: GenericText, first: np.ndarray, vocabulary: int | None, unknown_id: int | None) -> str:
    """Why texts say little about what the untouched model could do; empty: they say enough."""
    told = "such texts say little about what the model could do before; name ones that it knows in preserve.probe"
    tokens = [token for ids in text.ids for token in ids]
    unknown = sum(token == unknown_id for token in tokens) / max(1, len(tokens))
    if unknown_id is not None and unknown > MOST_UNKNOWN:
        return f"{unknown:.0%} of their tokens are unknown to the tokenizer: {told}"
    loss, chance = float(np.mean(first)), math.log(vocabulary) if vocabulary else math.inf
    if text.writes and loss > NEAR_CHANCE * chance:
        return f"the untouched model's loss is {loss:.2f} nats a token (guessing: {chance:.2f}): {told}"
    return ""


def measured(before: np.ndarray, after: np.ndarray) -> Drift:
    """The mean drift of texts with its standard error."""
    moved = drift(before, after)
    error = float(moved.std(ddof=1)) / math.sqrt(len(moved)) if len(moved) > 1 else 0.0
    return Drift(mean=float(moved.mean()), error=error, texts=len(moved))


def drift(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Of each text: nats by which its loss rose, or 1 - cosine of its two states: float64 [texts]."""
    if before.ndim == 1:
        return after - before
    # Of equal states the product may differ from 1 by rounding.
    return np.maximum(0.0, np.round(1.0 - (before * after).sum(axis=1), 12))
