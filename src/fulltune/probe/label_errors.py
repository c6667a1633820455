"""Rows whose label is probably wrong, by linear classifiers on the untouched model; and how far that can be trusted.

How that is found out, by wrong labels that are put in on purpose, is told in docs/data.md. In a second round the rows
that the first one suspects are left out of what the classifiers learn from (confident learning: Northcutt et al. 2021,
arXiv 1911.00068). A row's *margin* is the probability of its label less that of the likeliest other one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from fulltune.probe.layers import NoProbe
from fulltune.probe.linear import FOLDS, MIDDLE, Items, fits

JUDGED = ("single_label", "tags", "multi_label")
"""Problems whose labels are judged: here, and in `part_errors`."""
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
    """Judge the label of each row.

    Args:
        items: Single labels, one item a row.

    Raises:
        NoProbe: When there are too few rows, or nothing can be fitted.
    """
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
        raise NoProbe("the untouched model's features do not tell the classes apart")
    cut, recall, precision, wrong = calibrated(margins, planted)
    return Suspected(margins, other, cut, len(planted), recall, precision, wrong)


def calibrated(
    margins: np.ndarray, planted: np.ndarray, sure: tuple[float, ...] = SURE
) -> tuple[float, float, float, float]:
    """Where to cut, by the margins of rows and of planted errors.

    Args:
        margins: Of the rows as they are.
        planted: Of the planted errors.
        sure: Shares of these below margins below which right labels hardly lie.

    Returns:
        The margin, the recall and the estimated precision below it, and the estimated number of errors.
    """
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
        raise NoProbe("the untouched model's features do not tell the classes apart")
    return out_of_fold(items, ~other, 1)


def out_of_fold(items: Items, learned: np.ndarray, seed: int, strength: float = MIDDLE) -> np.ndarray:
    """Probabilities by classifiers that did not see the row: float64 [items, outputs].

    Args:
        items: All of them.
        learned: Which ones may be learned from: bool [items].
        seed: Says which rows are left out together.
        strength: As for `fits`.
    """
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
    """Words without most of those with the tag O, which tell little for their number, and what each logit then lacks.

    That it is a constant of the class holds for logistic regressions: King & Zeng 2001, Political Analysis 9 (2).
    """
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
