"""Words whose tag is probably wrong, and labels of which a row has one too many.

As in `label_errors` each is judged by classifiers that did not see its row, and how far that can be trusted is measured
with errors that are put in on purpose. One round is enough: a second one found no more (docs/log.md).

Only errors of one kind are claimed, because the classifiers err in one direction far more than in the other.

*Words.* What is put in is what annotators do most: an entity is missed, all its words are O. The other way round, a
word with an entity's tag that the classifiers take for O, or for another type, is mostly a title or a name of which
they cannot know, however sure they are (of 31 that were read 3 had a wrong tag). So such words are not listed.

*Several labels.* Each label of each row is a decision of its own. What is put in is any label that a row lacks. A label
that seems to be missing is often one that is mixed up with one that the row has: it is *doubtful*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fulltune.probe.label_errors import (
    DOUBT,
    LEAST_ROWS,
    MOST_OTHER,
    Suspected,
    calibrated,
    margins_of,
    out_of_fold,
    planted_at_a_time,
)
from fulltune.probe.layers import NoProbe
from fulltune.probe.linear import Items

STRENGTH = 4.0
SURE = (0.1, 0.25)
"""As in `label_errors`, but fewer: right labels lie where half of these planted errors do."""
MOST_WORDS, MOST_DECISIONS = 100_000, 400_000
"""That are judged: words, and labels times rows; of more, those of rows drawn at random."""
LEAST_ENTITIES = 50
NOT_TOLD_APART = "the untouched model's features do not tell the classes apart"


def suspected_parts(items: Items) -> Suspected:
    """Judge each word's tag, or each label that a row has or lacks.

    Args:
        items: Tags (the first one is O), one item a word; or several labels, one item a row.

    Raises:
        NoProbe: When there are too few rows, or nothing can be fitted.
    """
    is_tags = items.kind == "tags"
    if not is_tags and LEAST_ROWS * items.num_outputs > MOST_DECISIONS:
        raise NoProbe(f"{items.num_outputs:,} labels are too many to judge each of them")
    items = items.sampled(MOST_WORDS if is_tags else MOST_DECISIONS // items.num_outputs)
    _refuse(items)
    margins, other = _margins(items)
    rows = items.rows if is_tags else np.repeat(items.rows, items.num_outputs)
    given = items.labels.ravel() > 0
    claimed = ~given if is_tags else given
    planted = _planted(items, rows)
    if np.quantile(planted, SURE[0]) >= 0:  # hardly one is noticed
        raise NoProbe(NOT_TOLD_APART)
    _, row = np.unique(rows, return_inverse=True)
    worst = np.ones(row.max() + 1)
    np.minimum.at(worst, row[claimed], margins[claimed])
    below, recall, precision, wrong = calibrated(_spread(worst), _spread(planted), SURE)
    if wrong > MOST_OTHER * len(worst):
        raise NoProbe(NOT_TOLD_APART)
    cut = np.where(claimed, math.tanh(below), -math.inf)
    if is_tags:  # all of an entity, also those of its words that are less sure
        runs = _runs((margins < 0) & claimed, rows)
        cut[(runs >= 0) & np.isin(runs, runs[margins < cut])] = 0.0
    return Suspected(
        *(margins, other, cut, len(planted), recall, precision, wrong),
        doubt=np.where(given, -math.inf, DOUBT),
        rows=rows,
        places=np.arange(len(rows)) - np.searchsorted(rows, rows),
    )


def word_shapes(words: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """How each word is written, and its neighbours, of which a model without capitals sees nothing: [words, 21].

    Args:
        words: All that are judged.
        rows: The row of each.
    """
    own = np.array(
        [
            (
                one[:1].isupper(),
                one.isupper(),
                one.islower(),
                any(map(str.isdigit, one)),
                one[:1] == "@",
                one[:1] == "#",
            )
            for one in words
        ],
        np.float32,
    )
    same = rows[1:] == rows[:-1]
    own = np.column_stack([own, np.append(True, ~same)])  # sentences begin with a capital
    before, after = np.zeros_like(own), np.zeros_like(own)
    before[1:][same], after[:-1][same] = own[:-1][same], own[1:][same]
    return np.concatenate([own, before, after], axis=1)


def _refuse(items: Items) -> None:
    num_rows = len(np.unique(items.rows))
    if num_rows < LEAST_ROWS:
        raise NoProbe(f"labels cannot be judged by {num_rows:,} rows: that takes at least {LEAST_ROWS}")
    if items.kind == "tags" and (entities := int(_runs(items.labels > 0, items.rows).max() + 1)) < LEAST_ENTITIES:
        raise NoProbe(f"tags cannot be judged by {entities:,} entities: that takes at least {LEAST_ENTITIES}")


def _margins(items: Items) -> tuple[np.ndarray, np.ndarray]:
    """Of each word, or of each row's each label, and what is likelier: float64 and int64 [items]."""
    chances = out_of_fold(items, np.ones(len(items.rows), bool), 0, STRENGTH)
    if items.kind == "tags":
        return margins_of(chances, items.labels)
    has = items.labels.ravel() > 0
    return np.where(has, 1, -1) * (2 * chances.ravel() - 1), (~has).astype(np.int64)


def _planted(items: Items, rows: np.ndarray) -> np.ndarray:
    """The margins of errors that were put in, each by its worst item."""
    is_tags, found = items.kind == "tags", list[float]()
    entity = _runs(items.labels.ravel() > 0, rows) if is_tags else np.zeros(0)
    count, times = planted_at_a_time(int(entity.max()) + 1 if is_tags else len(items.rows))
    for seed in range(times):
        drawn, labels = np.random.default_rng(seed), items.labels.copy()
        if is_tags:  # of entities side by side all are missed
            changed = [np.flatnonzero(entity == one) for one in drawn.choice(entity.max() + 1, count, replace=False)]
        else:
            lacking = np.flatnonzero((labels == 0).any(axis=1))
            few = drawn.choice(lacking, min(count, len(lacking)), replace=False)
            changed = [
                np.array([row * labels.shape[1] + drawn.choice(np.flatnonzero(labels[row] == 0))]) for row in few
            ]
        labels.flat[np.concatenate(changed)] = 0 if is_tags else 1
        margins, _ = _margins(replace(items, labels=labels))
        found += [float(margins[them].min()) for them in changed]
    return np.array(found)


def _spread(margins: np.ndarray) -> np.ndarray:
    """Those near 1 and -1 drawn apart: of a rare label nearly all are there."""
    return np.arctanh(np.clip(margins, -1 + 1e-9, 1 - 1e-9))


def _runs(chosen: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """To which run of neighbours in a row each chosen item belongs, from 0; -1: it is not chosen."""
    goes_on = chosen[1:] & chosen[:-1] & (rows[1:] == rows[:-1])
    begins = chosen & ~np.append(False, goes_on)
    return np.where(chosen, np.cumsum(begins) - 1, -1)
