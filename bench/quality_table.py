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
    rate: float | None
    rates: tuple[float, ...]
    """That were tried."""
    seconds: float
    """Of a run, the median."""
    data: str
    """Hash of the rows."""
    failed: int
    """Runs that gave no model."""

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
    trials = [one for one in mine if one["search"]]
    rate = best_rate(trials)
    final = {
        one["seed"]: one for one in mine if one["value"] is not None and (not trials or one["rate"] == rate)
    }  # the newest of each
    if not final:
        return None
    chosen = [final[seed] for seed in sorted(final)]
    metric = latest["metric"]
    return Entry(
        metric,
        tuple(sorted(final)),
        np.stack([row_values(metric, unpacked(metric, one["outcomes"])) for one in chosen]),
        rate,
        tuple(sorted({one["rate"] for one in trials})),
        float(np.median([one["seconds"] for one in chosen])),
        latest["data"],
        sum(one["value"] is None for one in mine),
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
            lost = f", {found.failed} without a model" if found and found.failed else ""
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
    """What has to be reached, and whether it is."""
    made = ["| bar | measured | |", "|---|---|---|"]
    for name, rows, seeds in points:
        ours = entry(lines, name, rows, "fulltune")
        if (least := LEAST.get((name, rows))) is not None:
            passed = None if ours is None else 100 * ours.mean >= least
            made.append(_bar(f"{title(name, rows)}: fulltune at least {least}", _shown(ours, seeds), passed))
        free = [(one, found) for one in FROZEN if (found := entry(lines, name, rows, one))]
        best = max(free, key=lambda one: one[1].mean, default=None)
        ahead = AHEAD_OF_FROZEN.get((name, rows), 0.0)
        made.append(_against(f"{title(name, rows)}: fulltune minus", ours, best, ahead, errors=0.0))
        if seeds == 1:
            continue  # too long to search rates
        searched, lora = entry(lines, name, rows, "fulltune-searched"), entry(lines, name, rows, "lora-probe")
        rival = ("lora-probe", lora) if lora else None
        made.append(_against(f"{title(name, rows)}: fulltune-searched minus", searched, rival, 0.0, errors=1.0))
    return "\n".join(made)


def _shown(found: Entry | None, wanted: int) -> str:
    return "" if found is None else f"{100 * found.mean:.2f} ({len(found.seeds)} of {wanted} seeds)"


def _against(text: str, ours: Entry | None, rival: tuple[str, Entry] | None, ahead: float, errors: float) -> str:
    """A bar on a difference, from which so many standard errors may be missing."""
    allowed = f"at least {ahead:g}" + (", less its standard error" if errors else "")
    name, other = rival or ("the best of what costs no training" if not errors else "lora-probe", None)
    text = f"{text} {name}, {allowed}"
    found = difference(ours, other) if ours and other else None
    if found is None:
        return _bar(text, "", None)
    over = "rows and seeds" if found.over_seeds else "rows"
    shown = f"{100 * found.value:+.2f} ± {100 * found.error:.2f} (over {over})"
    return _bar(text, shown, 100 * (found.value + errors * found.error) >= ahead)


def _bar(text: str, shown: str, passed: bool | None) -> str:
    return f"| {text} | {shown} | {'not measured' if passed is None else 'PASS' if passed else 'FAIL'} |"
