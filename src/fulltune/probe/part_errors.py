"""Words whose tag is probably wrong, and labels of which a row has one too many or too few.

As in `label_errors` each is judged by classifiers that did not see its row, and how far that can be trusted is measured
with errors that are put in on purpose. One round is enough: a second one found no more (docs/log.md).

*Words.* What is put in is what annotators do most: an entity is missed, all its words are O. The other way round nothing
can be claimed: a word with an entity's tag that the classifiers take for O, or for another type, is mostly a title or a
name of which they cannot know, however sure they are. So it is never held against O, and where another entity's tag is
clearly likelier, it is *doubtful*.

*Several labels.* Each label of each row is a decision of its own. A label is taken from some rows and added to others;
the two are calibrated apart, because a rare label that a row has looks unlikely much more often than one that it lacks
looks likely.
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


def suspected_parts(items: Items) -> Suspected:
    """Judge each word's tag, or each label that a row has or lacks.

    Args:
        items: Tags (the first one is O), one item a word; or several labels, one item a row.

    Raises:
        NoProbe: When there are too few rows, or nothing can be fitted.
    """
    is_tags = items.kind == "tags"
    items = items.sampled(MOST_WORDS if is_tags else MOST_DECISIONS // items.num_outputs)
    _refuse(items)
    chances = _chances(items)
    margins, other = _margins(items, chances)
    given = items.labels.ravel() > 0
    rows = items.rows if is_tags else np.repeat(items.rows, items.num_outputs)
    found: list[tuple[bool, float]] = []
    count, times = planted_at_a_time(_runs(given, rows).max() + 1 if is_tags else len(items.rows))
    for seed in range(times):
        drawn = np.random.default_rng(seed)
        labels, changed = _missed(items, count, drawn) if is_tags else _moved(items, chances, count, drawn)
        wrong = replace(items, labels=labels)
        of_wrong, _ = _margins(wrong, _chances(wrong))
        found += [(bool(labels.flat[part[0]] > 0), float(of_wrong[part].min())) for part in changed]
    cuts, caught, right, wrongs = {False: -math.inf, True: -math.inf}, 0.0, 0.0, 0.0
    for side in {one for one, _ in found}:
        planted = np.array([margin for one, margin in found if one == side])
        cuts[side], recall, precision, number = _cut(margins[given == side], rows[given == side], planted)
        caught, wrongs = caught + recall * len(planted), wrongs + number
        right += precision * len(np.unique(rows[(given == side) & (margins < cuts[side])]))
    cut = np.where(given, cuts[True], cuts[False])
    suspects = margins < cut
    if is_tags:  # all of an entity, also those of its words that are less sure
        beside = _runs((margins < 0) & ~given, rows)
        cut[(beside >= 0) & np.isin(beside, beside[suspects])] = 0.0
    return Suspected(
        *(margins, other, cut, len(found)),
        recall=caught / len(found),
        precision=min(1.0, right / max(1, len(np.unique(rows[suspects])))),
        wrong=wrongs,
        doubt=np.where(given & (not is_tags), -math.inf, DOUBT),
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
            (one[:1].isupper(), one.isupper(), one.islower(), any(map(str.isdigit, one)), one[:1] == "@", one[:1] == "#")
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


def _chances(items: Items) -> np.ndarray:
    return out_of_fold(items, np.ones(len(items.rows), bool), 0, STRENGTH)


def _margins(items: Items, chances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each word, or of each row's each label, and what is likelier: float64 and int64 [items]."""
    if items.kind != "tags":
        has = items.labels.ravel() > 0
        return np.where(has, 1, -1) * (2 * chances.ravel() - 1), (~has).astype(np.int64)
    chances = chances.copy()
    chances[items.labels > 0, 0] = 0.0  # an entity is held against others alone
    return margins_of(chances, items.labels)


def _cut(margins: np.ndarray, rows: np.ndarray, planted: np.ndarray) -> tuple[float, float, float, float]:
    """As `calibrated`, by the worst item of each row."""
    if np.quantile(planted, SURE[0]) >= 0:  # hardly a planted error is noticed
        return -math.inf, 0.0, 0.0, 0.0
    _, row = np.unique(rows, return_inverse=True)
    worst = np.ones(row.max() + 1)
    np.minimum.at(worst, row, margins)
    cut, recall, precision, wrong = calibrated(worst, planted, SURE)
    if wrong > MOST_OTHER * len(worst):
        raise NoProbe("the untouched model's features do not tell the classes apart")
    return cut, recall, precision, wrong


def _runs(chosen: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """To which run of neighbours in a row each chosen item belongs, from 0; -1: it is not chosen."""
    goes_on = chosen[1:] & chosen[:-1] & (rows[1:] == rows[:-1])
    begins = chosen & ~np.append(False, goes_on)
    return np.where(chosen, np.cumsum(begins) - 1, -1)


Planted = tuple[np.ndarray, list[np.ndarray]]
"""All labels with some that are wrong, and the numbers of each error's items."""


def _missed(items: Items, count: int, drawn: np.random.Generator) -> Planted:
    """Entities whose words are O (of several side by side, all)."""
    runs, labels = _runs(items.labels > 0, items.rows), items.labels.copy()
    changed = [np.flatnonzero(runs == one) for one in drawn.choice(runs.max() + 1, count, replace=False)]
    labels[np.concatenate(changed)] = 0
    return labels, changed


def _moved(items: Items, chances: np.ndarray, count: int, drawn: np.random.Generator) -> Planted:
    """Rows that lack one of their labels, and rows with one more, drawn from what they would be mistaken for."""
    labels, changed = items.labels.copy(), []
    for number, row in enumerate(drawn.choice(len(labels), count, replace=False)):
        weights = chances[row] * (labels[row] == 0) if number % 2 else labels[row].astype(np.float64)
        if weights.sum() > 0:
            label = drawn.choice(len(weights), p=weights / weights.sum())
            labels[row, label] = 1 - labels[row, label]
            changed.append(np.array([row * len(weights) + label]))
    return labels, changed
