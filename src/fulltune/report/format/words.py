from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from fulltune.files import write_text
from fulltune.recipe.functions import is_own
from fulltune.records.comparison import Decision, Difference
from fulltune.records.plan import Plan
from fulltune.records.scores import Estimate
from fulltune.text import format_bytes, format_metric, format_number, format_percent, format_seconds, is_share

# Text from data may hold terminal escapes, NUL (invalid in HTML), halves of a character that UTF-8 cannot write, or
# marks that reverse the text around it: show them by code instead of obeying them. Newline and tab stay.
_UNSAFE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff\\ufffe\\uffff]"
)


OF_ANSWERS = ("rougeL", "chrf", "exact_match", "bleu", "number_match", "json_equal")


def metric_name(name: str) -> str:
    """Return a readable name: `token_accuracy` becomes `token accuracy`. A function's name stays as it is."""
    return name if is_own(name) else name.replace("_", " ")


def format_estimate(metric: str, value: Estimate) -> str:
    """Format a value with its interval, such as `92.1% [90.4%, 93.6%]`, or with the reason why there is none."""
    interval = value.no_interval_reason or f"{format_metric(metric, value.low)}, {format_metric(metric, value.high)}"
    return f"{format_metric(metric, value.value)} [{interval}]"


def describe_trained(plan: Plan | None) -> str:
    """Describe which parameters are trained."""
    if plan is None or not plan.num_frozen_parameters:
        return "all parameters fine-tuned"
    how = f"not full: all except {', '.join(plan.freeze)}" if plan.freeze else plan.method
    return f"{plan.num_trainable_parameters:,} parameters trained ({how})"


def describe_traffic(plan: Plan) -> str | None:
    """Describe the bytes that each process sends per step, or return None for a single process."""
    if not plan.sent_bytes:
        return None
    each, passes = "", plan.gradient_accumulation_steps
    if passes > 1 and plan.sent_bytes_per_micro_batch:
        each = f"; {format_bytes(plan.sent_bytes_per_micro_batch)} of this for each of {passes} micro batches"
    several = f"; each of {plan.num_machines} machines sends as much to the others" if plan.num_machines > 1 else ""
    sends = f"{plan.num_processes} processes sends {format_bytes(plan.sent_bytes)} per step{several}"
    return f"each of {sends} ({plan.placement}{each})"


def describe_stream(plan: Plan) -> tuple[tuple[str, str], ...]:
    """Describe the tiers, a step's time and the disk's wear of a streamed run as (name, text)."""
    if (disk := plan.stream) is None:
        return ()
    host = f"; host {format_bytes(plan.memory.host)}" if plan.memory and plan.memory.host else ""
    tiers = f"disk {format_bytes(disk.state_bytes)} of state and {format_bytes(disk.gradient_bytes)} of gradients{host}"
    tiers += f"; {format_bytes(disk.cache_bytes)} of weights stay in memory" if disk.cache_bytes else ""
    source = "measured" if disk.is_measured else "assumed"
    speed = f"reads {disk.read_per_second / 1e9:.2g} GB/s, writes {disk.written_per_second / 1e9:.2g} GB/s ({source})"
    written = plan.state["weights"] + plan.state["optimizer"] + disk.gradient_bytes
    wear = f"{format_bytes(written)} a step: {disk.rated_writes // written:,} steps until the drive's rated writes"
    rows = {"streamed": f"{disk.num_units} units; {disk.unit_in_words}", "tiers": tiers, "disk speed": speed}
    if disk.step_seconds and plan.time:
        waiting, updating = disk.step_seconds["disk"], disk.step_seconds["optimizer"]
        passing = max(seconds for name, seconds in disk.step_seconds.items() if name != "optimizer")
        slow = "; they wait for the disk: more rows per step, or a faster disk, would help" * (waiting == passing)
        rows["a step"] = f"passes {format_seconds(passing)}, update {format_seconds(updating)} more{slow}"
        rows["a day"] = f"{format_count(86400 * plan.time.tokens_per_second)} tokens"
    return (*rows.items(), ("wear", f"{wear} ({disk.rated_writes / 1e12:,.4g} TB, train.stream.rated_writes)"))


def readable_status(outcome: str) -> str:
    """Return readable words for an attempt's status. `spiked` counts as diverged."""
    return "diverged" if outcome == "spiked" else outcome.replace("_", " ")


def sanitize(text: str) -> str:
    """Replace control and text-direction characters with their codes."""
    return _UNSAFE.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    return " ".join(sanitize(text).split())


def write_sanitized(path: Path, text: str, private: bool = False) -> None:
    """Write a text file without unsafe characters."""
    write_text(path, sanitize(text), private)


def cut_text(text: str, limit: int) -> str:
    """Cut text after `limit` characters, if possible between words, and append how many are missing."""
    if len(text) <= limit:
        return text
    # One more character shows whether the last word ends there; text without spaces, such as Chinese, is cut anywhere.
    words = re.match(r".*\S(?=\s)", text[: limit + 1], re.DOTALL)
    beginning = words[0] if words and len(words[0]) > limit / 2 else text[:limit].rstrip()
    return f"{beginning} … ({len(text) - len(beginning):,} more characters)"


_FILE_ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".gguf", ".txt", ".jinja")


def strip_folders(source: str) -> str:
    """Return a path without its folders. Hub ids and `package:NAME/PATH` stay whole."""
    path = PureWindowsPath(source)  # splits at both kinds of slash
    is_local = source.startswith(("/", "~", ".")) or path.drive or path.suffix.lower() in _FILE_ENDINGS
    return path.name if is_local and not source.startswith("package:") else source


def text_or_empty(text: str) -> str:
    """Return the text, or `(empty)` if it is blank."""
    return text if text.strip() else "(empty)"


def describe_weights(share: float) -> str:
    """Describe weights interpolated between the pretrained (`share` 0) and the trained model (1)."""
    if share in (0, 1):
        return "the trained model" if share else "the pretrained model"
    return f"{format_percent(share)} of the way from the pretrained to the trained model"


def format_drift(drift: float, in_nats: bool) -> str:
    """Format a drift as a percentage: 1 - exp(-drift) if `in_nats` (language models' KL divergence), else the drift
    itself."""
    share = 100 * (-math.expm1(-drift) if in_nats else drift)
    if 0.001 <= abs(share) < 0.095:
        return f"{share:.2g}%"
    return f"{share:.2f}%" if abs(share) < 10 else f"{share:.0f}%"


# ---- comparisons ----------------------------------------------------------------------------------------------------

NOTHING = "–"


@dataclass(frozen=True)
class MetricFormatter:
    """Formats a metric's values and differences with the margin's precision."""

    metric: str
    margin: float

    @classmethod
    def of(cls, decision: Decision) -> MetricFormatter:
        return cls(decision.metric, decision.margin)

    @property
    def in_points(self) -> bool:
        return is_share(self.metric)

    @property
    def name(self) -> str:
        return metric_name(self.metric)

    @property
    def _decimals(self) -> int:
        """Number of decimals of a difference: at least two, and one more than the margin has."""
        margin = 100 * self.margin if self.in_points else self.margin
        return min(6, max(2, 1 - math.floor(math.log10(margin) + 1e-9))) if margin > 0 else 3

    def value(self, value: float) -> str:
        """Format a value: `92.1%`, `2.305`, `12.31`."""
        if not math.isfinite(value):
            return "not finite"
        if self.in_points:
            return f"{100 * value:.{self._decimals - 1}f}%"
        before_point = len(str(abs(int(value)))) - 1
        return f"{value:,.{max(0, self._decimals - before_point)}f}"

    def estimate(self, estimate: Estimate) -> str:
        """Format a value with its interval: `92.1% [90.9, 93.3]`."""
        low, high = (self.value(bound).removesuffix("%") for bound in (estimate.low, estimate.high))
        return f"{self.value(estimate.value)} [{low}, {high}]"

    def difference(self, value: float) -> str:
        """Format a difference with its sign: `+0.62` (percentage points if the metric is a share)."""
        if not math.isfinite(value):
            return "not finite"
        rounded = round(100 * value if self.in_points else value, self._decimals) + 0.0  # no -0.00
        return f"{rounded:+,.{self._decimals}f}"

    def interval(self, value: float, low: float, high: float) -> str:
        return f"{self.difference(value)} [{self.difference(low)}, {self.difference(high)}]"

    def adjusted(self, gap: Difference) -> str:
        """Format a difference with its interval, which holds for all methods simultaneously."""
        return self.interval(gap.estimate, gap.adjusted_low, gap.adjusted_high)

    def amount(self, value: float) -> str:
        """Format the size of a difference, without a sign: `1 point`, `1.4 points`, `0.013`."""
        if not self.in_points:
            return f"{value:.2g}"
        shown = f"{100 * value:.2g}" if value < 0.995 else f"{100 * value:.0f}"
        return f"{shown} point{'' if shown == '1' else 's'}"


def format_ratio(value: float) -> str:
    """Format a ratio: `0.67×`, `1.04×`, `12.0×`."""
    if not math.isfinite(value):
        return NOTHING
    if value >= 9.995:
        return f"{value:,.1f}×" if value < 99.95 else f"{value:,.0f}×"
    return f"{value:.2f}".rstrip("0").rstrip(".") + "×" if value >= 0.095 or value == 0 else f"{value:.2g}×"


def format_large_number(value: float) -> str:
    """Shorten a large number: `22.7 M`, `1.5 T`, `950`."""
    for power, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * power:
            return f"{format_number(value / power)} {letter}"
    return format_speed(value)


def format_speed(value: float) -> str:
    """Format a number without decimals, or if it is below 10 with two significant digits."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def format_count(value: float) -> str:
    """Format a number of parameters, with B for billions: `6.7 B`."""
    return format_large_number(value).replace("G", "B")
