"""The lines of `bench/quality.py` as a table, and its bars: means over seeds, paired differences over rows and seeds.

A metric is taken as a mean over the test rows. Accuracy is one. The share of the variance that is explained (R²) is one
for the given rows. Of F1 each row has its part to first order: 2 right - F1 (found + expected), over the sum of found
and expected ones. So a difference of two contestants is a mean of one table [seeds, rows], and its variance, with rows
and seeds both drawn, that of its row means over the rows, plus that of its seed means over the seeds, minus what both
count (the rest over rows times seeds).
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Line = Mapping[str, Any]
FROZEN = ("frozen-logreg", "frozen-centroid", "frozen-twin")
_TYPES = {"accuracy": np.uint8, "f1": np.uint8, "r2": np.int16}
_PARTS = {"accuracy": 1, "f1": 3, "r2": 2}
_THOUSANDTHS = 1000
"""Numbers are kept to three places."""


def packed(metric: str, outcomes: np.ndarray) -> str:
    """What came out of each row, as text."""
    kept = np.round(outcomes * _THOUSANDTHS) if metric == "r2" else outcomes
    return base64.b64encode(zlib.compress(kept.astype(_TYPES[metric]).tobytes(), 9)).decode()


def unpacked(metric: str, text: str) -> np.ndarray:
    """Accuracy: [rows]; else [rows, parts]."""
    flat = np.frombuffer(zlib.decompress(base64.b64decode(text)), _TYPES[metric]).astype(np.float64)
    flat = flat / _THOUSANDTHS if metric == "r2" else flat
    return flat if metric == "accuracy" else flat.reshape(-1, _PARTS[metric])


def row_values(metric: str, outcomes: np.ndarray) -> np.ndarray:
    """A number for each row whose mean is the metric: [rows]."""
    if metric == "accuracy":
        return outcomes
    if metric == "f1":
        right, found, expected = outcomes.T
        both = (found + expected).sum()
        value = 2 * right.sum() / both if both else 0.0
        return value + len(outcomes) * (2 * right - value * (found + expected)) / max(1.0, both)
    predicted, true = outcomes.T
    return 1 - (predicted - true) ** 2 / true.var()


# ---- which lines are a contestant's ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A contestant at a point."""

    metric: str
    seeds: tuple[int, ...]
    values: np.ndarray
    """What each row adds: [seeds, rows]."""
    outcomes: tuple[np.ndarray, ...]
    """What came out of each row, by seed."""
    train_seconds: float | None
    """Of the training alone, the median."""
    rate: float | None
    rates: tuple[float, ...]
    """That were tried."""
    seconds: float
    """Of a run, the median."""
    data: str
    """Hash of the rows."""
    failed: tuple[int, ...]
    """Seeds that gave no model."""

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def trained(self) -> bool:
        return self.seeds != (0,)

    @property
    def at_the_edge(self) -> bool:
        """The best rate is the lowest or the highest of those tried."""
        return len(self.rates) > 1 and self.rate in (min(self.rates), max(self.rates))


def entry(lines: Sequence[Line], name: str, rows: int, contestant: str) -> Entry | None:
    """What is there of a contestant at a point, by the settings of the newest line; None: nothing."""
    mine = [one for one in lines if (one["set"], one["rows"], one["contestant"]) == (name, rows, contestant)]
    if not mine:
        return None
    latest = mine[-1]
    mine = [one for one in mine if (one["settings"], one["data"]) == (latest["settings"], latest["data"])]
    trials = [*{one["rate"]: one for one in mine if one["search"]}.values()]  # the newest of each rate
    rate = best_rate(trials)
    newest = {one["seed"]: one for one in mine if not trials or one["rate"] == rate}
    final = {seed: one for seed, one in newest.items() if one["value"] is not None}
    if not final:
        return None
    chosen = [final[seed] for seed in sorted(final)]
    metric = latest["metric"]
    outcomes = tuple(unpacked(metric, one["outcomes"]) for one in chosen)
    notes = [one.get("notes", {}) for one in chosen]
    trained = [one["train_seconds"] for one in notes if "train_seconds" in one]
    return Entry(
        metric,
        tuple(sorted(final)),
        np.stack([row_values(metric, one) for one in outcomes]),
        outcomes,
        float(np.median(trained)) if trained else None,
        rate,
        tuple(sorted({one["rate"] for one in trials})),
        float(np.median([one["seconds"] for one in chosen])),
        latest["data"],
        tuple(sorted(newest.keys() - final.keys())),
    )


def best_rate(trials: Sequence[Line]) -> float | None:
    """The rate with the best metric on the eval rows; None: no trial gave a model."""
    good = [one for one in trials if one["value"] is not None]
    return max(good, key=lambda one: one["eval_value"])["rate"] if good else None


# ---- differences -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One contestant minus another."""

    value: float
    error: float
    """Standard error over rows, and over seeds where there are several."""
    over_seeds: bool


def difference(one: Entry, other: Entry) -> Difference | None:
    """On the same test rows, the same seeds as pairs; None: they were scored on different rows."""
    if one.data != other.data or one.values.shape[1] != other.values.shape[1]:
        return None
    if one.trained and other.trained:
        both = [seed for seed in one.seeds if seed in other.seeds]
        if not both:
            return None
        table = _of(one, both) - _of(other, both)
    else:
        table = (one.values if one.trained else one.values.mean(axis=0)) - (
            other.values if other.trained else other.values.mean(axis=0)
        )
    return error_of(table)


def error_of(table: np.ndarray) -> Difference:
    """The mean of differences[seeds, rows], and its standard error."""
    seeds, rows = table.shape
    of_rows, of_seeds = table.mean(axis=0), table.mean(axis=1)
    variance = of_rows.var(ddof=1) / rows
    if seeds > 1:
        rest = table - of_rows - of_seeds[:, None] + table.mean()
        twice = (rest**2).sum() / ((seeds - 1) * (rows - 1)) / (seeds * rows)
        variance += of_seeds.var(ddof=1) / seeds - twice
    return Difference(float(table.mean()), math.sqrt(max(0.0, variance)), seeds > 1)


def _of(one: Entry, seeds: Sequence[int]) -> np.ndarray:
    return one.values[[one.seeds.index(seed) for seed in seeds]]


# ---- tables ----------------------------------------------------------------------------------------------------


def title(name: str, rows: int) -> str:
    return f"{name} {f'{rows:,}' if rows else 'all'}"


def table(lines: Sequence[Line], points: Sequence[tuple[str, int, int]], contestants: Sequence[str]) -> str:
    """Means on the test rows: a row for each contestant, a column for each point.

    Args:
        lines: Of the points' file.
        points: Set, rows and seeds that are wanted.
        contestants: In this order.
    """
    made = [
        "| mean over seeds, points | " + " | ".join(title(name, rows) for name, rows, _ in points) + " |",
        "|---" + "|---:" * len(points) + "|",
    ]
    for contestant in contestants:
        cells = [_cell(entry(lines, name, rows, contestant), seeds) for name, rows, seeds in points]
        if any(cells):
            made.append(f"| {contestant} | " + " | ".join(cell or "not measured" for cell in cells) + " |")
    return "\n".join(made)


def _cell(found: Entry | None, wanted: int) -> str:
    if found is None:
        return ""
    text = f"{100 * found.mean:.1f}"
    if not found.trained:
        return text
    if len(found.seeds) > 1:
        text += f" ± {100 * found.values.mean(axis=1).std(ddof=1):.1f}"
    return text + (f" ({len(found.seeds)} of {wanted} seeds)" if len(found.seeds) < wanted else "")


def rates(lines: Sequence[Line], points: Sequence[tuple[str, int, int]], contestants: Sequence[str]) -> str:
    """The rate that was taken (marked where it is the lowest or highest of those tried), and seconds of a run."""
    made = [
        "| rate taken; seconds of a run | " + " | ".join(title(name, rows) for name, rows, _ in points) + " |",
        "|---" + "|---:" * len(points) + "|",
    ]
    for contestant in contestants:
        cells = []
        for name, rows, _ in points:
            found = entry(lines, name, rows, contestant)
            edge = " (edge)" if found and found.at_the_edge else ""
            rate = f"{found.rate:g}{edge}; " if found and found.rate is not None else ""
            lost = f", no model with seed {', '.join(map(str, found.failed))}" if found and found.failed else ""
            cells.append(f"{rate}{found.seconds:.0f} s{lost}" if found else "")
        if any(cells):
            made.append(f"| {contestant} | " + " | ".join(cells) + " |")
    return "\n".join(made)


# ---- bars ------------------------------------------------------------------------------------------------------

LEAST = {
    ("banking77", 500): 76.0,
    ("banking77", 2000): 88.8,
    ("banking77", 0): 93.2,
    ("wnut17", 1000): 41.2,
    ("wnut17", 0): 43.5,
}
AHEAD_OF_FROZEN = {("banking77", 2000): 0.5, ("banking77", 0): 0.5}
"""Points by which `fulltune` has to be ahead of what costs no training; elsewhere 0."""


def bars(lines: Sequence[Line], points: Sequence[tuple[str, int, int]]) -> str:
    """What has to be reached, and whether it is: a seed without a model is a failure, a missing one leaves it open.

    Args:
        lines: Of the points' file.
        points: Set, rows and seeds that are wanted.
    """
    made = ["| bar | measured | |", "|---|---|---|"]
    for name, rows, seeds in points:
        where, ours = title(name, rows), entry(lines, name, rows, "fulltune")
        if (least := LEAST.get((name, rows))) is not None:
            shown = "" if ours is None else f"{100 * ours.mean:.2f}"
            passed = ours is not None and 100 * ours.mean >= least
            made.append(_bar(f"{where}: fulltune at least {least}", shown, passed, [ours], seeds))
        free = [(one, found) for one in FROZEN if (found := entry(lines, name, rows, one))]
        name_of_best, best = max(
            free, key=lambda one: one[1].mean, default=("the best of what costs no training", None)
        )
        ahead = AHEAD_OF_FROZEN.get((name, rows), 0.0)
        text = f"{where}: fulltune minus {name_of_best}, at least {ahead:g}"
        made.append(_against(text, ours, best, ahead, errors=0.0, seeds=seeds))
        if seeds == 1:
            continue  # too long to search rates
        searched, lora = (entry(lines, name, rows, one) for one in ("fulltune-searched", "lora-probe"))
        text = f"{where}: fulltune-searched minus lora-probe, at least 0, less its standard error"
        made.append(_against(text, searched, lora, 0.0, errors=1.0, seeds=seeds))
    return "\n".join(made)


def _against(text: str, ours: Entry | None, other: Entry | None, ahead: float, errors: float, seeds: int) -> str:
    """A bar on a difference, from which so many standard errors may be missing."""
    found = difference(ours, other) if ours and other else None
    if found is None:
        return _bar(text, "", False, [None], seeds)
    over = "rows and seeds" if found.over_seeds else "rows"
    shown = f"{100 * found.value:+.2f} ± {100 * found.error:.2f} (over {over})"
    return _bar(text, shown, 100 * (found.value + errors * found.error) >= ahead, [ours, other], seeds)


def _bar(text: str, shown: str, passed: bool, of: Sequence[Entry | None], wanted: int) -> str:
    trained = [one for one in of if one is None or one.trained]
    if None in trained:
        verdict = "not measured"
    elif lost := [seed for one in trained if one for seed in one.failed]:
        verdict = f"FAIL: no model with seed {', '.join(map(str, lost))}"
    else:
        fewest = min(len(one.seeds) for one in trained if one)
        verdict = "PASS" if passed else "FAIL"
        verdict = verdict if fewest >= wanted else f"not measured: {verdict} with {fewest} of {wanted} seeds"
    return f"| {text} | {shown} | {verdict} |"
