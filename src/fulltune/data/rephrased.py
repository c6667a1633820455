"""Train rows that say in other words what an eval or test row says, by the untouched model's sentence embeddings.

The rule is a bound on the cosine alone. docs/data-evidence.md has what was measured with it, and what else
was tried: it finds rewordings, and neither most free paraphrases nor that two words changed places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fulltune.data.judge import Reader
from fulltune.models.shapes import is_decoder
from fulltune.probe.layers import NoProbe
from fulltune.records.data import DataSummary, SplitName

ALIKE = 0.95
"""Least cosine of two texts that say the same; measured with MiniLM-L6 alone."""
MOST_ALIKE_AT_RANDOM = 0.5
"""Mean cosine of two rows drawn at random, above which a cosine says little: many encoders that were not trained for
sentences put all texts close together. MiniLM-L6: 0.22 in Banking77. Set with room, not measured."""
_ROWS_AT_ONCE = 1024
HELD_OUT: tuple[SplitName, ...] = ("eval", "test")


@dataclass(frozen=True)
class Rephrased:
    """A train row, and the held-out row that is most like it."""

    position: int
    """Of the row in its split."""
    split: SplitName
    held_out: int
    """Position in that split."""
    cosine: float


@dataclass(frozen=True)
class ComparedTexts:
    """What a comparison of train rows with held-out ones found."""

    found: tuple[Rephrased, ...]
    """One for each train row, in their order."""
    left_out: int
    """Rows that were not read: of each split some are drawn at random where they are many."""


def rephrased(reader: Reader) -> ComparedTexts | str:
    """Train rows whose text is like a held-out row's in the eyes of the untouched model.

    Args:
        reader: Of rows of text classification.

    Returns:
        What was found; or why nothing can be compared.
    """
    if (why_not := _refused(reader)) is not None:
        return why_not
    try:
        return compared(reader)
    except NoProbe as no:
        return str(no)


def _refused(reader: Reader) -> str | None:
    """Why the rows of this model and data are not compared."""
    config = reader.base.config
    if "text_pair" in reader.summary.columns:
        return "rows are pairs of texts; only single texts are compared"
    if config.is_encoder_decoder or is_decoder(config):
        return f"a '{config.model_type}' model writes text; only the states of an encoder are compared"
    return None


def compared(reader: Reader) -> ComparedTexts:
    """What `rephrased` gives, of rows that can be compared.

    Raises:
        NoProbe: When the model's states say nothing, or are alike for all rows.
    """
    summary: DataSummary = reader.summary
    items, positions = reader.items("train")
    alike = alike_at_random(items.features)
    if alike > MOST_ALIKE_AT_RANDOM:
        raise NoProbe(
            f"to this model all texts are alike (two train rows drawn at random have a cosine of {alike:.2f}, expected "
            f"at most {MOST_ALIKE_AT_RANDOM}); take one that was trained for sentence embeddings"
        )
    left_out, best = summary.splits["train"].rows - len(positions), dict[int, Rephrased]()
    for split in HELD_OUT:
        if split not in summary.splits or not summary.splits[split].rows:
            continue
        held_out, places = reader.items(split)
        left_out += summary.splits[split].rows - len(places)
        for at, (nearest, cosine) in enumerate(most_alike(items.features, held_out.features)):
            if cosine >= ALIKE and (at not in best or cosine > best[at].cosine):
                best[at] = Rephrased(int(positions[at]), split, int(places[nearest]), cosine)
    return ComparedTexts(tuple(best[at] for at in sorted(best)), left_out)


def alike_at_random(features: np.ndarray) -> float:
    """Mean cosine of two different rows.

    Args:
        features: float32 [rows, hidden], each of length 1.
    """
    count = len(features)
    if count < 2:
        return 0.0
    total = features.sum(axis=0, dtype=np.float64)
    return float((total @ total - count) / (count * (count - 1)))


def most_alike(
    train: np.ndarray, held_out: np.ndarray, rows_at_once: int = _ROWS_AT_ONCE
) -> Iterator[tuple[int, float]]:
    """Of each train row the held-out row of the largest cosine, the first of several; and that cosine.

    In memory are the cosines of some rows with some others at a time.

    Args:
        train: float32 [rows, hidden], each of length 1.
        held_out: The same of at least one other row.
        rows_at_once: Of each side.
    """
    for start in range(0, len(train), rows_at_once):
        part = train[start : start + rows_at_once]
        nearest, cosines = np.zeros(len(part), np.int64), np.full(len(part), -np.inf, np.float32)
        for first in range(0, len(held_out), rows_at_once):
            products = part @ held_out[first : first + rows_at_once].T
            highest = products.argmax(axis=1)
            value = products[np.arange(len(part)), highest]
            is_nearer = value > cosines
            nearest[is_nearer], cosines[is_nearer] = first + highest[is_nearer], value[is_nearer]
        yield from zip(nearest.tolist(), cosines.tolist(), strict=True)
