"""Labels that are probably wrong, by linear classifiers on the untouched model (docs/data.md: how far to trust them).

A label's *margin* is its probability, by classifiers that did not see its row, less that of the likeliest other one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fulltune.probe.linear import FOLDS, MIDDLE, Items, NoProbe, fits

PRECISION = 0.75
"""Wanted of the suspects; on rows with known errors it was about that (docs/log.md)."""
PLANTED_SHARE, PLANTED, MOST_REPEATED = 0.05, 200, 5
"""Of the rows are given a wrong label at a time, again until there are so many, or so often."""
SURE = (0.25, 0.5)
"""Shares of the planted errors below margins below which right labels hardly lie."""
LEAST_ROWS, LEAST_OF_A_CLASS = 100, 3
MOST_OTHER = 0.5
"""Share of the rows that the first round may leave out."""
MOST_OUTSIDE = 5_000
"""Words with the tag O that a classifier is fitted on."""
DOUBT = -0.5
"""Rows with a smaller margin are doubtful, and shown to be reviewed."""
NOT_TOLD_APART = "the untouched model's features do not tell the classes apart"
STRENGTH = 4.0
SURE_PARTS = (0.1, 0.25)
"""As `SURE`, but fewer: right labels of parts lie where half of the planted errors do."""
MOST_WORDS, MOST_DECISIONS = 100_000, 400_000
"""That are judged: words, and labels times rows; of more, those of rows drawn at random."""
LEAST_ENTITIES = 50


@dataclass(frozen=True)
class Suspected:
    """What is known of each item (a row's label, a word's tag, each label of a row), and how good that is."""

    margins: np.ndarray
    """float64 [items]; at most 1, and the lower, the less likely the label."""
    other: np.ndarray
    """The likeliest other class [items]; of several labels 1 if the row lacks this one, and 0 if it has it."""
    cut: float | np.ndarray
    """Items with a smaller margin are suspects: the same for all, or [items]."""
    planted: int
    recall: float
    """Share of the planted errors below the cut."""
    precision: float
    """As estimated; 0 where nothing is suspected."""
    wrong: float
    """Estimated number of wrong labels: a cautious guess, one standard error lower than it would be."""
    doubt: float | np.ndarray = DOUBT
    """Further items with a smaller margin are doubtful: the same for all, or [items]."""
    rows: np.ndarray | None = None
    """The row of each item, ascending [items]; None: an item is a row."""
    places: np.ndarray | None = None
    """Which word of its row an item is, or which label [items]; None: an item is a row."""

    @property
    def row_of_each(self) -> np.ndarray:
        """int64 [items]."""
        return np.arange(len(self.margins)) if self.rows is None else self.rows

    @property
    def suspects(self) -> np.ndarray:
        """bool [items]."""
        return self.margins < self.cut

    @property
    def doubtful(self) -> np.ndarray:
        """Further items with another label that is clearly likelier: bool [items]."""
        return (self.margins < self.doubt) & ~self.suspects


def suspected(items: Items) -> Suspected:
    """Judge the label of each row; raises `NoProbe` when there are too few rows, or nothing can be fitted."""
    labels = items.labels.astype(np.int64)
    counts = np.bincount(labels, minlength=items.num_outputs)
    if len(labels) < LEAST_ROWS or np.count_nonzero(counts >= LEAST_OF_A_CLASS) < 2:
        raise NoProbe(
            f"labels cannot be judged by {len(labels):,} rows: that takes at least {LEAST_ROWS}, and two classes with "
            f"at least {LEAST_OF_A_CLASS} rows each"
        )
    found = _in_two_rounds(items)
    margins, other = margins_of(found, labels)
    planted = _planted(items, found, margins)
    chance = float(((counts / len(labels)) ** 2).sum())
    if not len(planted) or (margins > 0).mean() < chance + 2 * math.sqrt(chance / len(labels)):
        raise NoProbe(NOT_TOLD_APART)
    cut, recall, precision, wrong = calibrated(margins, planted)
    return Suspected(margins, other, cut, len(planted), recall, precision, wrong)


def calibrated(
    margins: np.ndarray, planted: np.ndarray, sure: tuple[float, ...] = SURE
) -> tuple[float, float, float, float]:
    """Where to cut, by the margins of rows and planted errors: margin, recall, precision, and estimated errors."""
    margins, planted = np.sort(margins), np.sort(planted)
    wrong = max(_at_least(margins, planted, share) for share in sure)
    cuts = np.linspace(float(np.quantile(planted, sure[0])), min(0.0, float(planted[-1])), 50)[::-1]
    for cut in cuts:
        suspects, recall = int(np.searchsorted(margins, cut)), float(np.searchsorted(planted, cut)) / len(planted)
        precision = min(1.0, wrong * recall / max(1, suspects))
        if suspects and precision >= PRECISION:
            return float(cut), recall, precision, wrong
    return -math.inf, 0.0, 0.0, wrong


def _at_least(margins: np.ndarray, planted: np.ndarray, share: float) -> float:
    """Errors, by what lies where this share of the planted ones lies; sorted margins, one standard error cautious."""
    surely = int(np.searchsorted(margins, np.quantile(planted, share)))
    # A number of rows and a share of what is planted: both are counted, and vary as counts do.
    error = math.sqrt(1 / max(1, surely) + (1 - share) / (share * len(planted)))
    return surely / share * max(0.0, 1 - error)


def planted_at_a_time(of: int) -> tuple[int, int]:
    """How many of these are made wrong at a time, and how often."""
    count = max(1, round(PLANTED_SHARE * of))
    return count, min(MOST_REPEATED, -(-PLANTED // count))


def _planted(items: Items, probabilities: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """The margins of rows that were given a wrong label, drawn from what the classifiers would mistake them for."""
    good = np.flatnonzero(margins > 0)
    if len(good) < 2 * PLANTED_SHARE * len(margins):
        return np.zeros(0)
    labels = items.labels.astype(np.int64)
    count, times = planted_at_a_time(len(labels))
    others = probabilities + np.finfo(float).tiny  # one class may have all of it
    others[np.arange(len(labels)), labels] = 0.0
    found = []
    for seed in range(times):
        drawn = np.random.default_rng(seed)
        chosen = drawn.choice(good, count, replace=False)
        given = labels.copy()
        up_to = np.cumsum(others[chosen], axis=1)
        given[chosen] = (up_to <= drawn.random((count, 1)) * up_to[:, -1:]).sum(axis=1)
        changed = replace(items, labels=given)
        found.append(margins_of(_in_two_rounds(changed), given)[0][chosen])
    return np.concatenate(found)


def _in_two_rounds(items: Items) -> np.ndarray:
    """Probabilities of the classes, for each row from classifiers that did not see it: float64 [rows, classes]."""
    first = out_of_fold(items, np.ones(len(items.labels), bool), 0)
    other = _confidently_other(first, items.labels.astype(np.int64))
    if other.mean() > MOST_OTHER:
        raise NoProbe(NOT_TOLD_APART)
    return out_of_fold(items, ~other, 1)


def out_of_fold(items: Items, learned: np.ndarray, seed: int, strength: float = MIDDLE) -> np.ndarray:
    """Probabilities by classifiers that did not see the row, of the `learned` ones: float64 [items, outputs]."""
    _, row = np.unique(items.rows, return_inverse=True)
    fold = (np.random.default_rng(seed).permutation(row.max() + 1) % FOLDS)[row]
    found = np.zeros((len(items.rows), items.num_outputs))
    for number in range(FOLDS):
        part, lacking = _thinned(items.part((fold != number) & learned))
        # Classes of few rows, or a fold without some, are no reason to judge nothing.
        [(_, classifier)] = fits(part, strengths=(strength,))
        outputs = classifier(items.features[fold == number]).astype(np.float64) + lacking
        if items.kind == "multi_label":
            found[fold == number] = np.exp(-np.logaddexp(0, -outputs))
            continue
        powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        found[fold == number] = powers / powers.sum(axis=1, keepdims=True)
    return found


def _thinned(items: Items) -> tuple[Items, np.ndarray]:
    """Words without most of those with the tag O, and what each logit then lacks (a constant: King & Zeng 2001)."""
    lacking, outside = np.zeros(items.num_outputs), np.flatnonzero(items.labels == 0)
    if items.kind != "tags" or len(outside) <= MOST_OUTSIDE:
        return items, lacking
    kept = items.labels != 0
    kept[np.random.default_rng(0).choice(outside, MOST_OUTSIDE, replace=False)] = True
    lacking[0] = math.log(len(outside) / MOST_OUTSIDE)
    return items.part(kept), lacking


def _confidently_other(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether another class is as likely as its own rows have it on average, and the likeliest such: bool [rows]."""
    rows = np.arange(len(labels))
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    sums = np.bincount(labels, probabilities[rows, labels], minlength=probabilities.shape[1])
    usual = np.where(counts > 0, sums / np.maximum(1, counts), np.inf)
    confident = np.where(probabilities >= usual, probabilities, -1.0)
    return (confident.max(axis=1) >= 0) & (confident.argmax(axis=1) != labels)


def margins_of(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row's label, and the likeliest other class."""
    rows, others = np.arange(len(labels)), probabilities.copy()
    others[rows, labels] = -1.0
    other = others.argmax(axis=1)
    return probabilities[rows, labels] - others[rows, other], other


def suspected_parts(items: Items) -> Suspected:
    """Judge each word's tag (the first one is O), or each label that a row has or lacks; raises as `suspected`."""
    is_tags = items.kind == "tags"
    if not is_tags and LEAST_ROWS * items.num_outputs > MOST_DECISIONS:
        raise NoProbe(f"{items.num_outputs:,} labels are too many to judge each of them")
    items = items.sampled(MOST_WORDS if is_tags else MOST_DECISIONS // items.num_outputs)
    if (num_rows := len(np.unique(items.rows))) < LEAST_ROWS:
        raise NoProbe(f"labels cannot be judged by {num_rows:,} rows: that takes at least {LEAST_ROWS}")
    if is_tags and (entities := int(_runs(items.labels > 0, items.rows).max() + 1)) < LEAST_ENTITIES:
        raise NoProbe(f"tags cannot be judged by {entities:,} entities: that takes at least {LEAST_ENTITIES}")
    margins, other = _part_margins(items)
    rows = items.rows if is_tags else np.repeat(items.rows, items.num_outputs)
    given = items.labels.ravel() > 0
    claimed = ~given if is_tags else given
    planted = _planted_parts(items, rows)
    if np.quantile(planted, SURE_PARTS[0]) >= 0:  # hardly one is noticed
        raise NoProbe(NOT_TOLD_APART)
    _, row = np.unique(rows, return_inverse=True)
    worst = np.ones(row.max() + 1)
    np.minimum.at(worst, row[claimed], margins[claimed])
    below, recall, precision, wrong = calibrated(_spread(worst), _spread(planted), SURE_PARTS)
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
    """How each word is written, and its neighbours, of which a model without capitals sees nothing: [words, 21]."""
    shapes = (
        lambda word: word[:1].isupper(),
        str.isupper,
        str.islower,
        lambda word: any(map(str.isdigit, word)),
        lambda word: word[:1] == "@",
        lambda word: word[:1] == "#",
    )
    own = np.array([[shape(word) for shape in shapes] for word in words], np.float32)
    same = rows[1:] == rows[:-1]
    own = np.column_stack([own, np.append(True, ~same)])  # sentences begin with a capital
    before, after = np.zeros_like(own), np.zeros_like(own)
    before[1:][same], after[:-1][same] = own[:-1][same], own[1:][same]
    return np.concatenate([own, before, after], axis=1)


def _part_margins(items: Items) -> tuple[np.ndarray, np.ndarray]:
    """Of each word, or of each row's each label, and what is likelier: float64 and int64 [items]."""
    chances = out_of_fold(items, np.ones(len(items.rows), bool), 0, STRENGTH)
    if items.kind == "tags":
        return margins_of(chances, items.labels)
    has = items.labels.ravel() > 0
    return np.where(has, 1, -1) * (2 * chances.ravel() - 1), (~has).astype(np.int64)


def _planted_parts(items: Items, rows: np.ndarray) -> np.ndarray:
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
        margins, _ = _part_margins(replace(items, labels=labels))
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
