from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from fulltune.audit.texts import masked_text
from fulltune.records.scores import Slice
from fulltune.stats.bootstrap import Resampled, bounds_of
from fulltune.tasks import PLACE, Row
from fulltune.tasks.columns import is_blank
from fulltune.tasks.padding import object_array
from fulltune.text import counted

SAMPLES = 300
"""Maximum number of resamples for each slice's intervals."""
_FEWEST_ROWS = 10
_MOST_VALUES = 30


def slice_names(rows: Sequence[Row], column: str) -> np.ndarray:
    """Return each example's value of `column` as text. Values with few rows, and those beyond the most frequent, are
    joined."""
    cells = [row.get(column) for row in rows]
    # NaN differs from itself.
    values = ["(none)" if cell is None or cell != cell or is_blank(str(cell)) else str(cell).strip() for cell in cells]
    counts = Counter({row[PLACE]: value for row, value in zip(rows, values, strict=True)}.values())
    frequent = {value for value, count in counts.most_common(_MOST_VALUES) if count >= _FEWEST_ROWS}
    rest = f"other ({counted(len(counts) - len(frequent), 'value')})" if frequent else "no value has 10 test rows"
    return object_array([value if value in frequent else rest for value in values])


def worst_first(metrics: Mapping[str, Resampled], main: str, sign: int, confidence: float) -> tuple[Slice, ...]:
    """Return the metrics of each slice, the worst by the metric `main` first. `sign` is 1 if greater is better, else
    -1."""
    parts = list[Slice]()
    for value in dict.fromkeys(value for whole in metrics.values() for value in whole.slices):
        resampled = {name: whole.slices[value] for name, whole in metrics.items() if value in whole.slices}
        estimates = {name: of.estimate(confidence, bounds_of(name)) for name, of in resampled.items()}
        parts.append(Slice(value=masked_text(value), metrics=estimates))
    return tuple(sorted(parts, key=lambda part: sign * part.metrics[main].value if main in part.metrics else math.inf))
