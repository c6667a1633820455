"""What only reports write: metrics with their intervals, settings, and text from data that is shown, not obeyed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from fulltune.files import write_text
from fulltune.records.held import HeldRun
from fulltune.records.plan import MemoryKind, Plan
from fulltune.records.scores import Estimate
from fulltune.text import format_bytes, format_metric, format_percent

# Text from data may hold terminal escapes, NUL (invalid in HTML), halves of a character that UTF-8 cannot write, or
# marks that reverse the text around it: show them by code instead of obeying them. Newline and tab stay.
_UNSAFE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff\\ufffe\\uffff]"
)


OF_ANSWERS = ("rougeL", "chrf", "exact_match", "bleu")
"""Metrics of generated answers: the first that was computed says whether they are better."""


def metric_name(name: str) -> str:
    """A metric as read aloud: `token_accuracy` becomes `token accuracy`."""
    return name.replace("_", " ")


def interval(name: str, estimate: Estimate) -> str:
    """`[90.4%, 93.6%]`; of a single row, or group of rows, there is none."""
    if estimate.lone:
        return f"[{estimate.lone}]"
    return f"[{format_metric(name, estimate.low)}, {format_metric(name, estimate.high)}]"


def estimate(name: str, value: Estimate) -> str:
    """`92.1% [90.4%, 93.6%]`."""
    return f"{format_metric(name, value.value)} {interval(name, value)}"


def sent(plan: Plan) -> str:
    """What each process sends to the others, by the plan's arithmetic; empty for a single one."""
    if not plan.sent_bytes:
        return ""
    passes = plan.gradient_accumulation_steps
    each = f", {format_bytes(plan.sent_each_pass)} of it for each of {passes} micro batches"
    each = each if passes > 1 and plan.sent_each_pass else ""
    sum_of_step = format_bytes(plan.sent_bytes)
    several = f", and so does each of {plan.num_machines} machines to the others" if plan.num_machines > 1 else ""
    return f"each of {plan.num_processes} processes sends {sum_of_step} a step{several} ({plan.placement}{each})"


def at_the_peak(kinds: Mapping[MemoryKind, int]) -> str:
    """Where in a step the most memory is held, told by what is held there."""
    moment = "in the backward pass" if kinds.get("activations") else "in the optimizer's update"
    if not kinds.get("gradients"):
        moment = "before the first gradient is made"
    # A kind that is 0 there can be large at another moment.
    return f"Each kind at the moment of a step that needs the most memory: {moment}"


def setting_value(value: Any) -> str:
    """A setting as the recipe would write it."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value, ensure_ascii=False)


def status(outcome: str) -> str:
    """How an attempt ended, in words: one that spiked diverged, and may go back."""
    return "diverged" if outcome == "spiked" else outcome.replace("_", " ")


def harmless(text: str) -> str:
    """The same text with control and direction marks shown by their code instead of obeyed."""
    return _UNSAFE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """The text on one line, without anything that a terminal or a plot would obey."""
    return " ".join(harmless(text).split())


def write_harmless(path: Path, text: str, private: bool = False) -> None:
    """Write a file whole and `harmless`: every file of a report passes through here, so no text can slip past it."""
    write_text(path, harmless(text), private)


def clipped(text: str, limit: int) -> str:
    """At most the first `limit` characters, up to the end of a word where one is near, and how many were left out."""
    if len(text) <= limit:
        return text
    # A character more shows whether the last word ends there; without spaces, as in Chinese, anything is cut anywhere.
    words = re.match(r".*\S(?=\s)", text[: limit + 1], re.DOTALL)
    kept = words[0] if words and len(words[0]) > limit / 2 else text[:limit].rstrip()
    return f"{kept} … ({len(text) - len(kept):,} more characters)"


_FILE_ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".gguf", ".txt", ".jinja")


def file_name(place: str) -> str:
    """A model or file without the folders of this machine; a Hub id or `package:NAME/PATH` stays whole."""
    path = PureWindowsPath(place)  # splits at both kinds of slash
    is_local = place.startswith(("/", "~", ".")) or path.drive or path.suffix.lower() in _FILE_ENDINGS
    return path.name if is_local and not place.startswith("package:") else place


def without_rows(count: int, stands: str) -> str:
    """`without the 12 test rows whose text also stands in train`."""
    return f"without the {f'{count:,} test rows' if count > 1 else 'test row'} whose {stands}"


def named(text: str) -> str:
    """A label or an answer; an empty one is said to be empty."""
    return text if text.strip() else "(empty)"


INFEASIBLE = "infeasible"
"""The untouched model was kept."""


def certificate(found: HeldRun) -> str:
    """What became of the budget, in a word."""
    if found.sealed is None or not found.is_feasible:
        return INFEASIBLE
    return "PASS" if found.passed else "FAIL"


def way(share: float) -> str:
    """A point between the untouched and the trained model."""
    if share in (0, 1):
        return "the trained model" if share else "the untouched model"
    return f"{format_percent(share)} of the way from the untouched to the trained model"


def as_share(moved: float, writes: bool) -> str:
    """How far generic text has moved as its budget is given, in two digits: it is compared with that."""
    share = 100 * (-math.expm1(-moved) if writes else moved)
    if 0.001 <= abs(share) < 0.095:
        return f"{share:.2g}%"
    return f"{share:.2f}%" if abs(share) < 10 else f"{share:.0f}%"
