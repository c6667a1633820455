"""How a comparison's values, differences and costs are written."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fulltune.records.comparison import Decision, Difference
from fulltune.records.scores import Estimate
from fulltune.report.format import words
from fulltune.text import format_number, is_share

NOTHING = "–"
"""For what a method does not have, such as a time of training where nothing is trained."""


@dataclass(frozen=True)
class Writer:
    """Writes values and differences of one metric, as exactly as the margin asks for."""

    metric: str
    margin: float

    @classmethod
    def of(cls, decision: Decision) -> Writer:
        return cls(decision.metric, decision.margin)

    @property
    def in_points(self) -> bool:
        return is_share(self.metric)

    @property
    def name(self) -> str:
        return words.metric_name(self.metric)

    @property
    def _decimals(self) -> int:
        """One more than the margin has, two at least."""
        margin = 100 * self.margin if self.in_points else self.margin
        return min(6, max(2, 1 - math.floor(math.log10(margin) + 1e-9))) if margin > 0 else 3

    def value(self, value: float) -> str:
        """`92.1%`, `2.305`, `12.31`."""
        if not math.isfinite(value):
            return "not finite"
        if self.in_points:
            return f"{100 * value:.{self._decimals - 1}f}%"
        before_point = len(str(abs(int(value)))) - 1
        return f"{value:,.{max(0, self._decimals - before_point)}f}"

    def estimate(self, estimate: Estimate) -> str:
        """`92.1% [90.9, 93.3]`."""
        low, high = (self.value(bound).removesuffix("%") for bound in (estimate.low, estimate.high))
        return f"{self.value(estimate.value)} [{low}, {high}]"

    def difference(self, value: float) -> str:
        """With its sign, in points where the metric is a share: `+0.62`."""
        if not math.isfinite(value):
            return "not finite"
        rounded = round(100 * value if self.in_points else value, self._decimals) + 0.0  # no -0.00
        return f"{rounded:+,.{self._decimals}f}"

    def interval(self, value: float, low: float, high: float) -> str:
        """`+0.62 [-0.35, +1.58]`."""
        return f"{self.difference(value)} [{self.difference(low)}, {self.difference(high)}]"

    def adjusted(self, found: Difference) -> str:
        """A difference with the interval that holds for all methods together."""
        return self.interval(found.estimate, found.adjusted_low, found.adjusted_high)

    def amount(self, value: float) -> str:
        """A size of a difference, without a sign: `1 point`, `1.4 points`, `0.013`."""
        if not self.in_points:
            return f"{value:.2g}"
        shown = f"{100 * value:.2g}" if value < 0.995 else f"{100 * value:.0f}"
        return f"{shown} point{'' if shown == '1' else 's'}"

    def found_from(self, value: float) -> str:
        """From which size on a difference is found: `from 1.4 points on`."""
        return "none, however large" if self.in_points and value >= 1 else f"from {self.amount(value)} on"


def ratio(value: float) -> str:
    """`0.67×`, `1.04×`, `0.0065×`, `12.0×`."""
    if not math.isfinite(value):
        return NOTHING
    if value >= 9.995:
        return f"{value:,.1f}×" if value < 99.95 else f"{value:,.0f}×"
    return f"{value:.2f}".rstrip("0").rstrip(".") + "×" if value >= 0.095 or value == 0 else f"{value:.2g}×"


def fine_share(value: float) -> str:
    """`100%`, `45.2%`, `0.65%`, `0.0034%`: small shares keep two digits."""
    if not math.isfinite(value):
        return NOTHING
    if abs(value) >= 0.1 or value == 0:
        return f"{100 * value:.1f}".removesuffix(".0") + "%"
    return f"{100 * value:.2g}%"


def short(value: float) -> str:
    """`22.7 M`, `1.5 T`, `950`: numbers too long to be read."""
    for power, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * power:
            return f"{format_number(value / power)} {letter}"
    return f"{value:,.0f}"


def short_count(value: float) -> str:
    """Parameters: as `short`, but 10⁹ of them are a billion: `6.7 B`."""
    return short(value).replace("G", "B")
