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
from fulltune.forgetting.budget import MAX_REPLAYED, MAX_TEXTS, MIN_TEXTS, SELECTION_TOKENS
from fulltune.inference.run import GenericText
from fulltune.recipe.data import SUFFIXES
from fulltune.recipe.model import AUTO, BUNDLED, PreserveBlock
from fulltune.records.forgetting import Drift
from fulltune.tasks.columns import normalised
from fulltune.text import counted

NUM_TEXTS = 200
MAX_PARAGRAPH_LINES = 30
_KEY_WORDS, _DOCUMENTATION_KEY_WORDS = 64, 8
_MIN_MAX_WORDS = (20, 120)
_READ_WORDS = 48
"""Number of a text's words that fit into 64 tokens."""
_WORD_BYTES = 6
_EXCLUDED = ("test", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "__pycache__")


def load_generic_texts(
    file: str | None = None, max_texts: int = NUM_TEXTS, setting: str = "preserve.probe"
) -> tuple[list[str], str]:
    """Return at most `max_texts` texts in a fixed order, and their source: the file or, if None, the standard library's
    docstrings. Error messages begin with `setting`."""
    if file is None:
        return _distinct_in_fixed_order(_docstrings_of_standard_library(max_texts))[:max_texts], BUNDLED
    if file.lower().endswith(SUFFIXES):
        raise DataError(
            f"{setting}: {file}: expected plain text with one text per line or paragraph; write the texts into a .txt "
            "file"
        )
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{setting}: {file}: expected UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{setting}: {file}: cannot be read ({error.strerror}); expected a text file") from None
    lines = [line for line in text.splitlines() if line.strip()]
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    # A few blank lines do not turn a list of lines into paragraphs.
    has_paragraphs = len(paragraphs) > 1 and len(lines) <= MAX_PARAGRAPH_LINES * len(paragraphs)
    texts = _distinct_in_fixed_order(" ".join(part.split()) for part in (paragraphs if has_paragraphs else lines))
    if len(texts) < 2:
        kind = "paragraph" if has_paragraphs else "line"
        raise DataError(
            f"{setting}: {file}: contains {counted(len(texts), kind)}; expected at least 2 distinct lines or paragraphs"
        )
    return texts[:max_texts], file


@dataclass(frozen=True)
class BudgetTexts:
    """Disjoint generic texts of a run with a drift budget."""

    selection: list[str]
    held_out: list[str]
    replayed: list[str]


def load_budget_texts(block: PreserveBlock) -> BudgetTexts:
    """Return disjoint texts for selection, final measurement and replay. Raise `DataError` if there are too few."""
    replays_probe = block.replay == AUTO
    texts, source = load_generic_texts(block.probe, 2 * MAX_TEXTS + MAX_REPLAYED * replays_probe)
    each = min(MAX_TEXTS, count_texts_for(texts, SELECTION_TOKENS), len(texts) // (3 if replays_probe else 2))
    if each < MIN_TEXTS:
        needed = MIN_TEXTS * (3 if replays_probe else 2)
        use = (
            f"{MIN_TEXTS} for selection, {MIN_TEXTS} for the final measurement"
            + f", {MIN_TEXTS} for replay" * replays_probe
        )
        raise DataError(
            f"preserve.probe: {source}: contains {len(texts):,} texts; a budget needs at least {needed} ({use}): add "
            "lines or paragraphs"
        )
    replayed = texts[2 * each :][:MAX_REPLAYED]
    if not replays_probe:
        probe_keys = set(map(text_key, texts))
        candidates = load_generic_texts(block.replay, MAX_REPLAYED, "preserve.replay")[0] if block.replay else []
        replayed = [text for text in candidates if text_key(text) not in probe_keys]
        if block.replay and not replayed:
            raise DataError(
                f"preserve.replay: {block.replay}: all texts are also in preserve.probe; choose other texts"
            )
    return BudgetTexts(texts[:each], texts[each : 2 * each], replayed)


def count_texts_for(texts: Sequence[str], total_tokens: int) -> int:
    """Return how many of the first texts, if truncated, fit into about `total_tokens`."""
    # Scripts without spaces, or with several bytes per letter, have more tokens than words.
    sizes = (max(len(text.split()), len(text.encode()) // _WORD_BYTES) for text in texts)
    words = accumulate(min(size, _READ_WORDS) for size in sizes)
    return sum(total <= total_tokens * 3 // 4 for total in words)


def check_texts(block: PreserveBlock) -> None:
    """Raise `DataError` if the recipe's generic texts cannot be used."""
    if block.budget is not None:
        load_budget_texts(block)
    elif block.probe is not None:
        load_generic_texts(block.probe)


def _distinct_in_fixed_order(texts: Iterable[str]) -> list[str]:
    distinct = {text_key(text): text for text in texts if text}
    return sorted(distinct.values(), key=lambda text: hashlib.sha256(text.encode()).digest())


def text_key(text: str, words: int = _KEY_WORDS) -> str:
    """Return a text's first normalised words, which identify the text."""
    return " ".join(normalised(text).split()[:words])


@cache
def _docstrings_of_standard_library(count: int) -> tuple[str, ...]:
    """Return `count` or slightly more docstring paragraphs, in a fixed order of files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = (path.relative_to(root) for path in (*root.glob("*.py"), *root.glob("*/*.py")))
    included = [path for path in modules if not any(part in _EXCLUDED for part in path.parts)]
    paragraphs: dict[str, str] = {}
    for path in sorted(included, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest()):
        if len(paragraphs) >= count:
            break
        for text in _docstring_paragraphs(root / path):
            paragraphs.setdefault(text_key(text, _DOCUMENTATION_KEY_WORDS), text)
    return tuple(paragraphs.values())


def _docstring_paragraphs(file: Path) -> Iterator[str]:
    """Yield a file's docstring paragraphs that are prose of 20 to 120 words."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                text = " ".join(paragraph.split())
                letters = sum(character.isalpha() or character == " " for character in text)
                if _MIN_MAX_WORDS[0] <= len(text.split(" ")) <= _MIN_MAX_WORDS[1] and letters > 0.9 * len(text):
                    yield text


# ---- drift on these texts ----------------------------------------------------------------------------------------


NEAR_CHANCE, MAX_UNKNOWN = 0.8, 0.3


def why_texts_are_weak(
    generic_text: GenericText, losses_or_states: np.ndarray, vocabulary_size: int | None, unknown_id: int | None
) -> str | None:
    """Return why drift on these texts is a weak measure of forgetting, or None.

    `losses_or_states` is what `GenericText.measure` returns for the pretrained model.
    """
    advice = "so drift on these texts means little; set preserve.probe to texts that the model was pretrained on"
    tokens = [token for ids in generic_text.ids for token in ids]
    unknown = sum(token == unknown_id for token in tokens) / max(1, len(tokens))
    if unknown_id is not None and unknown > MAX_UNKNOWN:
        return f"{unknown:.0%} of their tokens are unknown to the tokenizer, {advice}"
    loss, chance = float(np.mean(losses_or_states)), math.log(vocabulary_size) if vocabulary_size else math.inf
    if generic_text.is_language_model and loss > NEAR_CHANCE * chance:
        return f"the pretrained model's loss is {loss:.2f} nats per token (chance: {chance:.2f}), {advice}"
    return None


def mean_drift(before: np.ndarray, after: np.ndarray) -> Drift:
    """Return the mean drift between two results of `GenericText.measure`, its standard error and the number of
    texts."""
    drifts = drift_per_text(before, after)
    error = float(drifts.std(ddof=1)) / math.sqrt(len(drifts)) if len(drifts) > 1 else 0.0
    return Drift(mean=float(drifts.mean()), error=error, texts=len(drifts))


def drift_per_text(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return each text's drift from two results of `GenericText.measure`: rise of the loss in nats, or 1 - cosine of
    the states."""
    if before.ndim == 1:
        return after - before
    # For equal states the product may differ from 1 by rounding.
    return np.maximum(0.0, np.round(1.0 - (before * after).sum(axis=1), 12))
