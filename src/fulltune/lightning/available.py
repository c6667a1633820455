"""Refuses a Lightning that is missing or too old, when the package is imported and before anything of it is used."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fulltune.errors import SetupError

OLDEST = (2, 5)
"""The tests pass with 2.5.0 and with 2.6.6; 2.4.0 does not restore the place inside an epoch."""


def problem_of(found: str | None) -> str | None:
    """Why a version cannot be used.

    Args:
        found: Of the package `lightning`, such as `2.6.6`; None: it is not installed.
    """
    oldest = ".".join(map(str, OLDEST))
    if found is None:
        return f"fulltune.lightning: needs the package lightning, {oldest} or newer; pip install 'fulltune[lightning]'"
    numbers = tuple(int(part) if part.isdigit() else 0 for part in found.split(".")[:2])
    if numbers >= OLDEST:
        return None
    return f"fulltune.lightning: needs lightning {oldest} or newer, found {found}; pip install -U 'fulltune[lightning]'"


def _installed() -> str | None:
    try:
        return version("lightning")
    except PackageNotFoundError:
        return None


if _problem := problem_of(_installed()):
    raise SetupError(_problem)
