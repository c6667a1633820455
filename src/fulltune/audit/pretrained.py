"""Detects label errors and outliers by the pretrained model's mean hidden states.

A label's *margin* is its out-of-fold probability minus that of the likeliest other label. A row's distance is the mean
of 1 - cosine to its nearest train rows (arXiv 2207.03061).
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

from fulltune import probe
from fulltune.inference.run import RowSubset
from fulltune.inference.store import Rows
from fulltune.models.base import Base, with_decoded_images
from fulltune.models.load import load_model
from fulltune.plan.resolve import device_and_precision
from fulltune.probe.features import FeatureExtractor, sample_rows
from fulltune.probe.linear import FOLDS, MIDDLE, Items, NoProbe, fit_at_strengths
from fulltune.recipe.fields import Recipe
from fulltune.records.audit import LabelErrors
from fulltune.records.data import DataSummary, SplitName
from fulltune.records.events import Listener, RowsRead
from fulltune.system import hardware
from fulltune.system.memory import is_out_of_memory
from fulltune.tasks import Target, task_named

BATCH = 32
OUT_OF_MEMORY = "ran out of memory while the pretrained model read the rows"


@dataclass(frozen=True)
class RowReader:
    """Reads prepared rows with the pretrained model, which is loaded on first use."""

    recipe: Recipe
    base: Base
    summary: DataSummary
    folder: Path
    listener: Listener
    _read: dict[SplitName, tuple[Items, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def extractor(self) -> FeatureExtractor:
        import torch

        task, target = task_named(self.recipe.task), Target.of(self.summary)
        device, precision = device_and_precision(self.recipe, hardware.measure_machine())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(probe.SEED)  # for a new head, which is not read
            changes = task.config_changes(target, self.base.processor)
            model: Any = load_model(
                replace(self.base, block=self.recipe.model), changes, head_is_new=task.FACTS.head_is_new
            )
        return FeatureExtractor(
            model.to(device),
            self.recipe.task,
            target,
            self.base.processor.pad_token_id,
            BATCH,
            precision,
            watch=lambda done, total, share: self.listener(
                RowsRead(name="reading rows with the pretrained model", done=done, total=total, share=share)
            ),
        )

    def items(self, split: SplitName) -> tuple[Items, np.ndarray]:
        """Return a split's (or a sample's) features and labels, and the rows' positions. Raises `NoProbe`."""
        if split in self._read:
            return self._read[split]
        try:
            rows = with_decoded_images(Rows(self.folder / split), self.base.processor)
            config = self.extractor.model.config.get_text_config()
            width = getattr(config, "hidden_size", None) or 0  # convolutional models have none
            sample = sample_rows(rows, self.extractor.kind, self.extractor.target.num_choices, width)
            features = self.extractor.features(sample, None)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise NoProbe(OUT_OF_MEMORY) from error
        values = features.mean if features.mean is not None else features.pair
        if values is None:
            raise NoProbe("this model returns fewer hidden states than tokens")
        positions = np.array(sample.positions if isinstance(sample, RowSubset) else range(len(rows)))
        self._read[split] = self.extractor.items(values, features), positions
        return self._read[split]


# ---- labels that are probably wrong --------------------------------------------------------------------------------

PRECISION = 0.75
"""Minimum share of wrong labels among suspects."""
PLANTED_SHARE, PLANTED, MAX_ROUNDS = 0.05, 200, 5
PLANTED_QUANTILES = (0.25, 0.5)
"""Quantiles of planted errors' margins; correct labels rarely have lower margins."""
MIN_ROWS, MIN_OF_A_CLASS = 100, 3
MAX_OTHER = 0.5
DOUBT = -0.5
NOT_SEPARABLE = "the pretrained model's features do not distinguish the classes"


@dataclass(frozen=True)
class JudgedLabels:
    """Judgements of labels, and their estimated reliability."""

    margins: np.ndarray
    """Margin of each label: float64 [rows]. A low margin suggests a wrong label."""
    other: np.ndarray
    suspects: np.ndarray
    """True for rows whose label is probably wrong: bool [rows]."""
    doubtful: np.ndarray
    """True for other rows whose label is much less likely than another: bool [rows]."""
    about: LabelErrors


def judge_labels(reader: RowReader) -> tuple[np.ndarray, JudgedLabels]:
    """Judge the train rows' labels; return the rows' positions and judgements. Raises `NoProbe` if impossible."""
    items, positions = reader.items("train")
    return positions, judge_labels_of(items)


def judge_labels_of(items: Items) -> JudgedLabels:
    """Judge the labels of `items`. Raises `NoProbe` for too few rows, or if features do not separate the classes."""
    labels = items.labels.astype(np.int64)
    counts = np.bincount(labels, minlength=items.num_outputs)
    if len(labels) < MIN_ROWS or np.count_nonzero(counts >= MIN_OF_A_CLASS) < 2:
        raise NoProbe(
            f"labels cannot be judged with {len(labels):,} rows: expected at least {MIN_ROWS}, and two classes with at "
            f"least {MIN_OF_A_CLASS} rows each"
        )
    probabilities = _probabilities_without_errors(items)
    margins, other = label_margins(probabilities, labels)
    planted = _plant_errors(items, probabilities, margins)
    chance = float(((counts / len(labels)) ** 2).sum())
    if not len(planted) or (margins > 0).mean() < chance + 2 * math.sqrt(chance / len(labels)):
        raise NoProbe(NOT_SEPARABLE)
    cut, recall, precision, wrong = choose_suspect_margin(margins, planted)
    suspects = margins < cut
    doubtful = (margins < DOUBT) & ~suspects
    about = LabelErrors(
        judged_rows=len(margins),
        agreement=float((margins > 0).mean()),
        suspects=int(suspects.sum()),
        planted=len(planted),
        recall=recall,
        precision=precision,
        estimated_errors=wrong,
    )
    return JudgedLabels(margins, other, suspects, doubtful, about)


def choose_suspect_margin(margins: np.ndarray, planted_margins: np.ndarray) -> tuple[float, float, float, float]:
    """Return the margin below which labels are suspects (-inf without suspects), the suspects' estimated recall and
    precision, and the estimated number of wrong labels.

    `planted_margins` are margins of deliberately wrong labels.
    """
    margins, planted_margins = np.sort(margins), np.sort(planted_margins)
    wrong = max(_estimate_min_errors(margins, planted_margins, share) for share in PLANTED_QUANTILES)
    cuts = np.linspace(
        float(np.quantile(planted_margins, PLANTED_QUANTILES[0])), min(0.0, float(planted_margins[-1])), 50
    )[::-1]
    for cut in cuts:
        suspects = int(np.searchsorted(margins, cut))
        recall = float(np.searchsorted(planted_margins, cut)) / len(planted_margins)
        precision = min(1.0, wrong * recall / max(1, suspects))
        if suspects and precision >= PRECISION:
            return float(cut), recall, precision, wrong
    return -math.inf, 0.0, 0.0, wrong


def _estimate_min_errors(margins: np.ndarray, planted_margins: np.ndarray, quantile: float) -> float:
    """Estimate the number of wrong labels, minus one standard error, from the margins below a planted quantile."""
    num_below = int(np.searchsorted(margins, np.quantile(planted_margins, quantile)))
    # Relative standard error of a count of rows, and of a share of the planted errors.
    error = math.sqrt(1 / max(1, num_below) + (1 - quantile) / (quantile * len(planted_margins)))
    return num_below / quantile * max(0.0, 1 - error)


def _plant_errors(items: Items, probabilities: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """Give sampled rows wrong labels, drawn from the probabilities; return these labels' margins: float64 [errors]."""
    good = np.flatnonzero(margins > 0)
    if len(good) < 2 * PLANTED_SHARE * len(margins):
        return np.zeros(0)
    labels = items.labels.astype(np.int64)
    count = max(1, round(PLANTED_SHARE * len(labels)))
    others = probabilities + np.finfo(float).tiny  # one class may have probability 1
    others[np.arange(len(labels)), labels] = 0.0
    margins_of_wrong = []
    for seed in range(min(MAX_ROUNDS, -(-PLANTED // count))):
        generator = np.random.default_rng(seed)
        positions = generator.choice(good, count, replace=False)
        wrong = labels.copy()
        cumulative = np.cumsum(others[positions], axis=1)
        wrong[positions] = (cumulative <= generator.random((count, 1)) * cumulative[:, -1:]).sum(axis=1)
        margins_of_wrong.append(
            label_margins(_probabilities_without_errors(replace(items, labels=wrong)), wrong)[0][positions]
        )
    return np.concatenate(margins_of_wrong)


def _probabilities_without_errors(items: Items) -> np.ndarray:
    """Return out-of-fold probabilities of classifiers fitted without probable errors: float64 [rows, classes]."""
    labels, rows = items.labels.astype(np.int64), np.arange(len(items.labels))
    probabilities = predict_out_of_fold(items, np.ones(len(labels), bool), 0)
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    sums = np.bincount(labels, probabilities[rows, labels], minlength=probabilities.shape[1])
    # A row is probably mislabelled if another class is the likeliest of those above their usual probability.
    usual = np.where(counts > 0, sums / np.maximum(1, counts), np.inf)
    confident = np.where(probabilities >= usual, probabilities, -1.0)
    other = (confident.max(axis=1) >= 0) & (confident.argmax(axis=1) != labels)
    if other.mean() > MAX_OTHER:
        raise NoProbe(NOT_SEPARABLE)
    return predict_out_of_fold(items, ~other, 1)


def predict_out_of_fold(items: Items, is_trained_on: np.ndarray, seed: int) -> np.ndarray:
    """Return each row's class probabilities, fitted on the `is_trained_on` rows of other folds: [rows, classes]."""
    fold = np.random.default_rng(seed).permutation(len(items.rows)) % FOLDS
    probabilities = np.zeros((len(items.rows), items.num_outputs))
    for number in range(FOLDS):
        # Rare classes may be missing from a fold; the others are judged anyway.
        [(_, classifier)] = fit_at_strengths(items.select((fold != number) & is_trained_on), strengths=(MIDDLE,))
        probabilities[fold == number] = softmax(classifier(items.features[fold == number]).astype(np.float64), axis=1)
    return probabilities


def label_margins(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each label's probability minus the likeliest other class's, and that class: float64, int64 [rows]."""
    rows, others = np.arange(len(labels)), probabilities.copy()
    others[rows, labels] = -1.0
    other = others.argmax(axis=1)
    return probabilities[rows, labels] - others[rows, other], other


# ---- outliers ------------------------------------------------------------------------------------------------------

NEIGHBOURS = 20
OUTLIER_IQRS = 2.5
"""Distance of the outlier threshold from the upper quartile, in interquartile ranges (Tukey 1977: 1.5 or 3)."""
MIN_TEXTS = 200
MAX_FAR = 0.1
_MAX_FAR_ROUNDS = 10
_SAME_SQUARE = 1e-8


def find_outliers(
    reader: RowReader, train_keys: np.ndarray, rows_of_split: Mapping[SplitName, int]
) -> tuple[dict[SplitName, dict[int, float]], float, int]:
    """Return each split's outliers (rows far from all train rows) as a dictionary from position to distance, the upper
    quartile of the other train rows' distances, and the number of rows not sampled.

    Train rows with equal `train_keys` count once. Raises `NoProbe` for too few or too varied rows.
    """
    items, positions = reader.items("train")
    unique_keys, first, inverse = np.unique(train_keys[positions], return_index=True, return_inverse=True)
    if len(unique_keys) < MIN_TEXTS:
        raise NoProbe(f"train has {len(unique_keys):,} different texts or images, expected at least {MIN_TEXTS}")
    states = items.features[first]
    distances, is_far, usual, fence = mark_outliers(states)
    if is_far.mean() > MAX_FAR:
        raise NoProbe(
            f"{is_far.mean():.0%} of the train rows are far from the others, so the rows are of several kinds"
        )
    num_unread = rows_of_split["train"] - len(positions)
    far: dict[SplitName, dict[int, float]] = {
        "train": {int(positions[at]): float(distances[of]) for at, of in enumerate(inverse) if is_far[of]}
    }
    for split in (name for name in ("eval", "test") if rows_of_split.get(name)):
        held_out, places = reader.items(split)
        num_unread += rows_of_split[split] - len(places)
        distances = mean_distance_to_nearest(held_out.features, states[~is_far])
        far[split] = {int(places[at]): float(distances[at]) for at in np.flatnonzero(distances > fence)}
    return far, usual, num_unread


def mark_outliers(states: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return each row's distance, whether it is an outlier, the other rows' upper quartile, and the threshold."""
    is_far = np.zeros(len(states), bool)
    for _ in range(_MAX_FAR_ROUNDS):
        distances = mean_distance_to_nearest(states, states[~is_far])
        lower, upper = np.quantile(distances[~is_far], [0.25, 0.75])
        fence = float(upper + OUTLIER_IQRS * (upper - lower))
        further = (distances > fence) & ~is_far
        is_far |= further
        if not further.any() or is_far.mean() > MAX_FAR:
            break
    return distances, is_far, float(upper), fence


def mean_distance_to_nearest(states: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return each state's mean distance (1 - cosine) to its 20 nearest `others`, without itself: [rows]."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=NEIGHBOURS + 1, algorithm="brute", metric="sqeuclidean").fit(others)
    squares = search.kneighbors(states)[0]  # for unit vectors, twice 1 - cosine
    return np.where(squares[:, :1] < _SAME_SQUARE, squares[:, 1:], squares[:, :-1]).mean(axis=1) / 2
