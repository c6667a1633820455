"""Bytes and times in words and back, and what metrics measure. Layer 0."""

from __future__ import annotations

import re

_SIZE = r"^\s*\d+(\.\d+)?\s*[KMGT]i?B\s*$"
"""What `parse_bytes` reads."""
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int:
    """The bytes of `6GiB` (binary), `24 GB` (decimal), `1.5 TiB` or `512MiB`.

    Raises:
        ValueError: Naming what was expected.
    """
    if re.match(_SIZE, text) is None:
        raise ValueError(f"'{text}': expected a size such as 6GiB, 512MiB or 24GB")
    if not float(re.findall(r"[\d.]+", text)[0]):
        raise ValueError(f"{text.strip()}: expected more than nothing, such as 6GiB")
    found = re.match(r"\s*([\d.]+)\s*(\w)(i?)", text)
    assert found is not None, "it has matched"
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** _POWERS[found[2]])


def in_words(num_bytes: int) -> str:
    """`1.5 GiB`, `87 MiB`, `12 KiB`."""
    if num_bytes >= 2**29:
        return f"{num_bytes / 2**30:,.1f} GiB"
    return f"{num_bytes / 2**20:,.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:,.0f} KiB"


_TIME = r"(?:(\d+(?:\.\d+)?)\s*h)?\s*(?:(\d+(?:\.\d+)?)\s*m(?:in)?)?\s*(?:(\d+(?:\.\d+)?)\s*s)?"


def parse_seconds(text: str) -> float:
    """The seconds of `30m`, `2h`, `90s` or `1h30m`.

    Raises:
        ValueError: Naming what was expected.
    """
    found = re.fullmatch(_TIME, text.strip())
    if found is None or not any(found.groups()):
        raise ValueError(f"'{text}': expected a time such as 30m, 2h or 90s")
    seconds = sum(float(part or 0) * size for part, size in zip(found.groups(), (3600, 60, 1), strict=True))
    if not seconds:
        raise ValueError(f"{text.strip()}: expected more than nothing, such as 30m")
    return seconds


_SHARES = {"accuracy", "token_accuracy", "exact_match", "f1", "precision", "recall"}


def is_share(metric: str) -> bool:
    """Whether a metric is a share of rows, words or tokens: shown in percent, its differences in points."""
    return metric in _SHARES or metric.startswith("f1_")
