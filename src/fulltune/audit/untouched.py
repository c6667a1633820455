"""Rows as the untouched model sees them: labels that are probably wrong, and rows that are unlike all others.

Linear classifiers on mean hidden states judge the labels (how far to trust them: docs/guides/data.md). A label's
*margin* is its probability, by classifiers that did not see its row, minus that of the likeliest other label. A row's
distance is the mean of 1 - cosine to its nearest train rows (arXiv 2207.03061).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from fulltune import plan, probe
from fulltune.inference.run import RowSubset
from fulltune.inference.store import Rows
from fulltune.models.base import Base, opened
from fulltune.models.load import load
from fulltune.probe.features import sample_rows
from fulltune.probe.linear import FOLDS, MIDDLE, Items, NoProbe, fits
from fulltune.recipe.fields import Recipe
from fulltune.records.audit import LabelErrors
from fulltune.records.data import DataSummary, SplitName
from fulltune.records.events import Listener, RowsRead
from fulltune.system import hardware
from fulltune.system.memory import is_out_of_memory
from fulltune.tasks import Target, task_named

BATCH = 32
OUT_OF_MEMORY = "memory ran out while the untouched model read the rows"


@dataclass(frozen=True)
class Reader:
    """Reads prepared rows with the untouched model; it is loaded when the first row is."""

    recipe: Recipe
    base: Base
    summary: DataSummary
    folder: Path
    """The run's `data` folder."""
    listener: Listener
    _read: dict[SplitName, tuple[Items, np.ndarray] | str] = field(default_factory=dict, repr=False, compare=False)
    """What was read already, or why it cannot be: several checks look at it."""

    @cached_property
    def extractor(self) -> probe.FeatureExtractor:
        """How rows go through the model."""
        import torch

        task, target = task_named(self.recipe.task), Target.of(self.summary)
        device, precision = plan.device_and_precision(self.recipe, hardware.here())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(probe.SEED)  # what the head lacks is drawn, and not read
            changes = task.config_changes(target, self.base.processor)
            model: Any = load(replace(self.base, block=self.recipe.model), changes, head_is_new=task.FACTS.head_is_new)
        return probe.FeatureExtractor(
            model.to(device),
            self.recipe.task,
            target,
            self.base.processor.pad_token_id,
            BATCH,
            precision,
            watch=lambda done, total, share: self.listener(
                RowsRead(name="reading rows with the untouched model", done=done, total=total, share=share)
            ),
        )

    def items(self, split: SplitName) -> tuple[Items, np.ndarray]:
        """Mean hidden states, labels and positions of a split's rows, or of some drawn at random; raises NoProbe."""
        if split not in self._read:
            try:
                self._read[split] = self._items(split)
            except NoProbe as error:
                self._read[split] = str(error)  # the error itself would keep the batch that did not fit
        items = self._read[split]
        if isinstance(items, str):
            raise NoProbe(items)
        return items

    def _items(self, split: SplitName) -> tuple[Items, np.ndarray]:
        try:
            rows = opened(Rows(self.folder / split), self.base.processor)
            config = self.extractor.model.config.get_text_config()
            width = getattr(config, "hidden_size", None) or 0  # none: convolutions
            chosen = sample_rows(rows, self.extractor.kind, self.extractor.target.num_choices, width)
            found = self.extractor.features(chosen, None)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise NoProbe(OUT_OF_MEMORY) from error
        if found.mean is None:
            raise NoProbe("this model gives fewer states than there are tokens")
        positions = np.array(chosen.positions if isinstance(chosen, RowSubset) else range(len(rows)))
        return self.extractor.items(found.mean, found), positions


# ---- labels that are probably wrong --------------------------------------------------------------------------------

PRECISION = 0.75
"""Wanted of the suspects; on rows with known errors it was about that (2026-11-28)."""
PLANTED_SHARE, PLANTED, MAX_REPEATED = 0.05, 200, 5
"""Of the rows are given a wrong label at a time, again until there are so many, or so often."""
SURE = (0.25, 0.5)
"""Shares of the planted errors below margins below which right labels hardly lie."""
MIN_ROWS, MIN_OF_A_CLASS = 100, 3
MAX_OTHER = 0.5
"""Share of the rows that the first round may leave out."""
DOUBT = -0.5
"""Rows with a smaller margin are doubtful, and shown to be reviewed."""
NOT_TOLD_APART = "the untouched model's features do not tell the classes apart"


@dataclass(frozen=True)
class JudgedLabels:
    """What is known of each row's label, and how good that is."""

    margins: np.ndarray
    """float64 [rows]; at most 1, and the lower, the less likely the label."""
    other: np.ndarray
    """The likeliest other class [rows]."""
    suspects: np.ndarray
    """bool [rows]."""
    doubtful: np.ndarray
    """Further rows with another label that is clearly likelier: bool [rows]."""
    about: LabelErrors


def judge(reader: Reader) -> tuple[np.ndarray, JudgedLabels]:
    """Positions of the train rows that were judged, and what is known of their labels; raises `NoProbe`."""
    items, positions = reader.items("train")
    return positions, judge_items(items)


def judge_items(items: Items) -> JudgedLabels:
    """Judge the label of each row; raises `NoProbe` when there are too few rows, or nothing can be fitted."""
    labels = items.labels.astype(np.int64)
    counts = np.bincount(labels, minlength=items.num_outputs)
    if len(labels) < MIN_ROWS or np.count_nonzero(counts >= MIN_OF_A_CLASS) < 2:
        raise NoProbe(
            f"labels cannot be judged by {len(labels):,} rows: that takes at least {MIN_ROWS}, and two classes with "
            f"at least {MIN_OF_A_CLASS} rows each"
        )
    found = _in_two_rounds(items)
    margins, other = margins_of(found, labels)
    planted = _planted(items, found, margins)
    chance = float(((counts / len(labels)) ** 2).sum())
    if not len(planted) or (margins > 0).mean() < chance + 2 * math.sqrt(chance / len(labels)):
        raise NoProbe(NOT_TOLD_APART)
    cut, recall, precision, wrong = calibrated(margins, planted)
    suspects = margins < cut
    doubtful = (margins < DOUBT) & ~suspects
    about = LabelErrors(
        judged_rows=len(margins),
        agreement=float((margins > 0).mean()),
        suspects=int(suspects.sum()),
        doubtful=int(doubtful.sum()),
        planted=len(planted),
        recall=recall,
        precision=precision,
        estimated_errors=wrong,
    )
    return JudgedLabels(margins, other, suspects, doubtful, about)


def calibrated(margins: np.ndarray, planted: np.ndarray) -> tuple[float, float, float, float]:
    """Where to cut, by the margins of rows and planted errors: margin, recall, precision, and estimated errors."""
    margins, planted = np.sort(margins), np.sort(planted)
    wrong = max(_at_least(margins, planted, share) for share in SURE)
    cuts = np.linspace(float(np.quantile(planted, SURE[0])), min(0.0, float(planted[-1])), 50)[::-1]
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


def _planted(items: Items, probabilities: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """The margins of rows that were given a wrong label, drawn from what the classifiers would mistake them for."""
    good = np.flatnonzero(margins > 0)
    if len(good) < 2 * PLANTED_SHARE * len(margins):
        return np.zeros(0)
    labels = items.labels.astype(np.int64)
    count = max(1, round(PLANTED_SHARE * len(labels)))
    others = probabilities + np.finfo(float).tiny  # one class may have all of it
    others[np.arange(len(labels)), labels] = 0.0
    found = []
    for seed in range(min(MAX_REPEATED, -(-PLANTED // count))):
        drawn = np.random.default_rng(seed)
        chosen = drawn.choice(good, count, replace=False)
        given = labels.copy()
        up_to = np.cumsum(others[chosen], axis=1)
        given[chosen] = (up_to <= drawn.random((count, 1)) * up_to[:, -1:]).sum(axis=1)
        found.append(margins_of(_in_two_rounds(replace(items, labels=given)), given)[0][chosen])
    return np.concatenate(found)


def _in_two_rounds(items: Items) -> np.ndarray:
    """Probabilities of the classes, for each row from classifiers that did not see it: float64 [rows, classes]."""
    every = np.ones(len(items.labels), bool)
    other = _confidently_other(out_of_fold(items, every, 0), items.labels.astype(np.int64))
    if other.mean() > MAX_OTHER:
        raise NoProbe(NOT_TOLD_APART)
    return out_of_fold(items, ~other, 1)


def out_of_fold(items: Items, learned: np.ndarray, seed: int) -> np.ndarray:
    """Probabilities by classifiers that did not see the row, of the `learned` ones: float64 [rows, classes]."""
    fold = np.random.default_rng(seed).permutation(len(items.rows)) % FOLDS
    found = np.zeros((len(items.rows), items.num_outputs))
    for number in range(FOLDS):
        # Classes of few rows, or a fold without some, are no reason to judge nothing.
        [(_, classifier)] = fits(items.select((fold != number) & learned), strengths=(MIDDLE,))
        found[fold == number] = softmax(classifier(items.features[fold == number]).astype(np.float64), axis=1)
    return found


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


# ---- outliers ------------------------------------------------------------------------------------------------------

NEIGHBOURS = 20
SPREADS = 2.5
"""Between the quartiles: so many of them the fence lies above the upper one (Tukey 1977: 1.5, and 3 for far out)."""
MIN_TEXTS = 200
MAX_FAR = 0.1
"""Share of the texts that may be far from the others: where more are, the rows are of several kinds."""
_ROUNDS = 10
_SAME = 1e-8
"""Square of the distance below which two vectors are of one text."""


def outliers(
    reader: Reader, train_keys: np.ndarray, counts: Mapping[SplitName, int]
) -> tuple[dict[SplitName, dict[int, float]], float, int]:
    """Rows far from all train rows; raises `NoProbe` where nothing can be told.

    Args:
        train_keys: A number of each train row's text or image: the same one counts once.

    Returns:
        Each split's positions of such rows with their distance, the distance that three train rows in four do not
        exceed, and how many rows were not drawn to be read.
    """
    items, positions = reader.items("train")
    different, first, inverse = np.unique(train_keys[positions], return_index=True, return_inverse=True)
    if len(different) < MIN_TEXTS:
        raise NoProbe(
            f"{len(different):,} different texts or images in train are too few: expected at least {MIN_TEXTS}"
        )
    states = items.features[first]
    distances, is_far, usual, fence = far_out(states)
    if is_far.mean() > MAX_FAR:
        raise NoProbe(f"{is_far.mean():.0%} of the train rows are far from the others: these are of several kinds")
    left_out = counts["train"] - len(positions)
    found: dict[SplitName, dict[int, float]] = {
        "train": {int(positions[at]): float(distances[of]) for at, of in enumerate(inverse) if is_far[of]}
    }
    for split in (one for one in ("eval", "test") if counts.get(one)):
        held_out, places = reader.items(split)
        left_out += counts[split] - len(places)
        theirs = nearest(held_out.features, states[~is_far])
        found[split] = {int(places[at]): float(theirs[at]) for at in np.flatnonzero(theirs > fence)}
    return found, usual, left_out


def far_out(states: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The rows' distances, whether each is far out, the upper quartile of those that are not, and the fence."""
    is_far = np.zeros(len(states), bool)
    for _ in range(_ROUNDS):
        distances = nearest(states, states[~is_far])
        lower, upper = np.quantile(distances[~is_far], [0.25, 0.75])
        fence = float(upper + SPREADS * (upper - lower))
        further = (distances > fence) & ~is_far
        is_far |= further
        if not further.any() or is_far.mean() > MAX_FAR:
            break
    return distances, is_far, float(upper), fence


def nearest(states: np.ndarray, others: np.ndarray, count: int = NEIGHBOURS) -> np.ndarray:
    """Mean of 1 - cosine to the nearest `count` of the others, one that is the same aside: float64 [rows]."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=count + 1, algorithm="brute", metric="sqeuclidean").fit(others)
    squares = search.kneighbors(states)[0]  # of vectors of length 1 twice 1 - cosine
    return np.where(squares[:, :1] < _SAME, squares[:, 1:], squares[:, :-1]).mean(axis=1) / 2
