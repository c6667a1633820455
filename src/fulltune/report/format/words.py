"""Numbers and foreign text in words: what a person reads, in a terminal or in a browser."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PureWindowsPath
from typing import Any

from fulltune.records.plan import MemoryKind
from fulltune.records.scores import Estimate
from fulltune.text import is_share

# Text from data may hold terminal escapes, NUL (invalid in HTML), halves of a character that UTF-8 cannot write, or
# marks that reverse the text around it: show them by code instead of obeying them. Newline and tab stay.
_UNSAFE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff\\ufffe\\uffff]"
)


def number(value: float) -> str:
    """Three significant digits; thousands are grouped: `0.0123`, `1,234`, `2e-05`."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 999.5:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:.3g}"


def count(value: int) -> str:
    """A whole number with grouped thousands."""
    return f"{value:,}"


def ordinal(value: int) -> str:
    """`2nd`, `3rd`, `11th`."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th") if value % 100 // 10 != 1 else "th"
    return f"{count(value)}{ending}"


def counted(value: int, noun: str) -> str:
    """A count with its noun: `1 row`, `1,200 rows`."""
    return f"{count(value)} {noun}" + ("" if value == 1 else "s")


def percent(value: float) -> str:
    """One decimal: `92.1%`."""
    return f"{100 * value:.1f}%" if math.isfinite(value) else "not finite"


def share(value: float) -> str:
    """Like `percent`, but only all is `100.0%` and only nothing is `0.0%`: here the difference matters."""
    if 0 < value < 0.0005:
        return "<0.1%"
    if 0.9995 <= value < 1:
        return ">99.9%"
    return percent(value)


def metric(name: str, value: float) -> str:
    """A metric's value: a percentage for accuracy-like ones, else three significant digits."""
    return percent(value) if is_share(name) else number(value)


def tick(name: str, value: float) -> str:
    """Like `metric`, without decimals that an axis does not need: `80%`."""
    return f"{round(100 * value, 1):g}%" if is_share(name) else number(value)


def metric_name(name: str) -> str:
    """A metric as read aloud: `token_accuracy` becomes `token accuracy`."""
    return name.replace("_", " ")


def interval(name: str, estimate: Estimate) -> str:
    """`[90.4%, 93.6%]`; of a single row, or group of rows, there is none."""
    if estimate.lone:
        return f"[{estimate.lone}]"
    return f"[{metric(name, estimate.low)}, {metric(name, estimate.high)}]"


def estimate(name: str, value: Estimate) -> str:
    """`92.1% [90.4%, 93.6%]`."""
    return f"{metric(name, value.value)} {interval(name, value)}"


def size(num_bytes: int) -> str:
    """Bytes in binary units: `1.50 GiB`, `87.1 MiB`."""
    if num_bytes < 1024:
        return counted(num_bytes, "byte")
    for unit, bytes_in_unit in (("KiB", 2**10), ("MiB", 2**20)):
        if num_bytes < 1024 * bytes_in_unit:
            return f"{number(num_bytes / bytes_in_unit)} {unit}"
    return f"{number(num_bytes / 2**30)} GiB"


AT_THE_PEAK = "Each kind at the moment of a step that needs the most memory"
"""What stands before `moment`: a kind that is 0 there can be large at another moment."""


def moment(kinds: Mapping[MemoryKind, int]) -> str:
    """Where in a step the most memory is held, told by what is held there."""
    if not kinds.get("gradients"):
        return "before the first gradient is made"
    return "in the backward pass" if kinds.get("activations") else "in the optimizer's update"


def duration(seconds: float) -> str:
    """`0.42 s`, `12 s`, `1 min 23 s`, `2 h 5 min`, `3 d 4 h`."""
    if not math.isfinite(seconds):
        return "not finite"
    if seconds < 9.5:
        return f"{number(seconds)} s"
    if seconds < 59.5:
        return f"{round(seconds)} s"
    if seconds < 3599.5:
        return "{} min {} s".format(*divmod(round(seconds), 60))
    if seconds < 86400 - 30:
        return "{} h {} min".format(*divmod(round(seconds / 60), 60))
    return "{} d {} h".format(*divmod(round(seconds / 3600), 24))


def listed(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def setting_value(value: Any) -> str:
    """A setting as the recipe would write it."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value, ensure_ascii=False)


def harmless(text: str) -> str:
    """The same text with control and direction marks shown by their code instead of obeyed.

    Every file of this room passes through here as a whole, so no text can slip past it.
    """
    text = text.replace("\r\n", "\n")
    return _UNSAFE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def clipped(text: str, limit: int) -> str:
    """At most the first `limit` characters, up to the end of a word where one is near, and how many were left out."""
    if len(text) <= limit:
        return text
    # A character more shows whether the last word ends there; without spaces, as in Chinese, anything is cut anywhere.
    words = re.match(r".*\S(?=\s)", text[: limit + 1], re.DOTALL)
    kept = words[0] if words and len(words[0]) > limit / 2 else text[:limit].rstrip()
    return f"{kept} … ({count(len(text) - len(kept))} more characters)"


_FILE_ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".gguf", ".txt", ".jinja")


def file_name(place: str) -> str:
    """A model or file without the folders of this machine; a Hub id or `package:NAME/PATH` stays whole."""
    path = PureWindowsPath(place)  # splits at both kinds of slash
    is_local = place.startswith(("/", "~", ".")) or path.drive or path.suffix.lower() in _FILE_ENDINGS
    return path.name if is_local and not place.startswith("package:") else place


def named(text: str) -> str:
    """A label or an answer; an empty one is said to be empty."""
    return text if text.strip() else "(empty)"


def one_line(text: str) -> str:
    """The text on one line, without anything that a terminal or a plot would obey."""
    return " ".join(harmless(text).split())
