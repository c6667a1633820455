from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int:
    """Parse `6GiB` (binary), `24 GB` (decimal), `1.5 TiB` or `512MiB` into bytes, or raise `ValueError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", text.strip())
    if match is None or not (amount := float(match[1])):
        raise ValueError(f"expected a size above 0, such as 6GiB, 512MB or 600TB, found '{text}'")
    return int(amount * (1024 if match[3] else 1000) ** _POWERS[match[2]])


def format_bytes(num_bytes: float) -> str:
    """Format bytes in binary units with three digits: `950 bytes`, `87.1 MiB`, `1.5 GiB`."""
    if num_bytes < 1024:
        return counted(round(num_bytes), "byte")
    unit, bytes_in_unit = next(
        ((unit, size) for unit, size in (("KiB", 2**10), ("MiB", 2**20)) if num_bytes < 999.5 * size), ("GiB", 2**30)
    )
    return f"{format_number(num_bytes / bytes_in_unit)} {unit}"


_TIME = re.compile(
    r"(?:(\d+(?:\.\d+)?)\s*d)?\s*(?:(\d+(?:\.\d+)?)\s*h)?\s*(?:(\d+(?:\.\d+)?)\s*m(?:in)?)?\s*(?:(\d+(?:\.\d+)?)\s*s)?"
)


def parse_seconds(text: str) -> float:
    """Parse `30m`, `2h`, `90s`, `1h30m`, `2d` or the output of `format_seconds` into seconds, or raise `ValueError`."""
    match = _TIME.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        raise ValueError(f"expected a time such as 30m, 2h or 90s, found '{text}'")
    seconds = sum(float(part or 0) * size for part, size in zip(match.groups(), (86400, 3600, 60, 1), strict=True))
    if not seconds:
        raise ValueError(f"expected more than 0, such as 30m, found '{text}'")
    return seconds


def parse_share(value: str | float) -> float:
    """Parse `1%`, `0.5 %` or a number such as 0.01 into a share between 0 and 1, or raise `ValueError`."""
    text = str(value).strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        point = "; write decimals after a point, not a comma" if "," in text else ""
        raise ValueError(f"expected a share such as 1% or 0.01, found '{value}'{point}") from None
    if not 0 < share < 1:
        meant = f"; for {text}% write '{text}%'" if 1 <= share < 100 and not text.endswith("%") else ""
        raise ValueError(f"expected a share above 0 and below 100%, such as 1%, found '{value}'{meant}")
    return share


def format_seconds(seconds: float) -> str:
    """Format seconds: `0.42 s`, `12 s`, `1 min 23 s`, `2 h 5 min`, `3 d 4 h`."""
    if not math.isfinite(seconds):
        return "not finite"
    if 0 < seconds < 0.01:
        return "<0.01 s"
    if seconds < 59.5:
        return f"{format_number(seconds) if seconds < 9.5 else round(seconds)} s"
    if seconds < 3599.5:
        return _two_units(round(seconds), 60, "min", "s")
    if seconds < 86400 - 30:
        return _two_units(round(seconds / 60), 60, "h", "min")
    return _two_units(round(seconds / 3600), 24, "d", "h")


def _two_units(amount: int, size: int, large: str, small: str) -> str:
    whole, rest = divmod(amount, size)
    return f"{whole} {large}" + (f" {rest} {small}" if rest else "")


def typed_seconds(seconds: float) -> str:
    """Format seconds as a command-line option takes them: `1h30m`, `6m`, `90s`."""
    return format_seconds(round(seconds)).replace("min", "m").replace(" ", "")


def format_number(value: float) -> str:
    """Format with three significant digits and grouped thousands: `0.0123`, `1,234`, `2e-05`."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e9 else f"{value:.3g}"


def to_yaml(value: Any) -> str:
    """Return a value as written in a recipe or after `--set`."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {to_yaml(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def counted(count: int, noun: str, plural: str = "") -> str:
    """Format a count with its noun: `1 row`, `1,200 rows`."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def format_percent(share: float) -> str:
    """Format a share as a percentage with one decimal: `92.1%`."""
    return f"{100 * share:.1f}%" if math.isfinite(share) else "not finite"


def format_share(share: float) -> str:
    """Format a share as a percentage. Only exactly 0 and 1 become `0.0%` and `100.0%`."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 else format_percent(share)


_SHARES = {"exact_match", "number_match", "json_equal", "f1", "precision", "recall"}


def is_share(metric: str) -> bool:
    return metric in _SHARES or metric.startswith("f1_") or metric.endswith("accuracy")


def format_metric(name: str, value: float) -> str:
    """Format a metric's value: shares as percentages, others with three significant digits."""
    return format_percent(value) if is_share(name) else format_number(value)


def listed(items: Sequence[str], last: str = "and") -> str:
    """Join items for a sentence: `a`, `a and b`, `a, b and c`."""
    return f" {last} ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def first_few(items: Sequence[str], max_items: int = 3) -> str:
    """List the first items and count the others: `a, b, c and 4 more`."""
    more = len(items) - max_items
    return ", ".join(items[:max_items]) + (f" and {more:,} more" if more > 0 else "")


def near_names(name: str, names: Iterable[str], most: int = 3, cutoff: float = 0.6) -> list[str]:
    """Return the most similar names, nearest first. `cutoff` is the minimum similarity, 0 to 1."""
    return difflib.get_close_matches(name, list(names), n=most, cutoff=cutoff)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return `did you mean 'model'?` for `modle`, or an empty string if no name is similar."""
    near = near_names(name, names, most=1)
    return f"did you mean '{near[0]}'?" if near else ""
