"""Which Lightning: `lightning` and `pytorch_lightning` hold the same code twice, and each takes its own classes only.

Refuses one that is missing or too old, when the package is imported and before anything of it is used.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fulltune.errors import SetupError

OLDEST = (2, 5)
"""The tests pass with 2.5.0 and with 2.6.6; 2.4.0 does not restore the place inside an epoch."""


def _problem(name: str) -> str | None:
    try:
        found = version(name)
    except PackageNotFoundError:
        found = "none"
    if tuple(int(part) if part.isdigit() else 0 for part in found.split(".")[:2]) >= OLDEST:
        return None
    oldest = ".".join(map(str, OLDEST))
    return f"fulltune.lightning: needs {name} {oldest} or newer, found {found}; pip install -U 'fulltune[lightning]'"


_NAMES = ("lightning", "pytorch_lightning")
_BEFORE = [name for name in _NAMES if name in sys.modules]
_OURS = next((name for name in (*_BEFORE, *_NAMES) if _problem(name) is None), "")
"""Of which our callbacks are: the other one's Trainer takes them too."""
if not _OURS:
    raise SetupError(str(_problem("lightning")))
Callback: Any = import_module(_OURS).Callback


def imported() -> str:
    """The package that the script imported, before this one or after it; of both `lightning`."""
    by_us_alone = {_OURS} - {*_BEFORE}
    return next((name for name in _NAMES if name in sys.modules and name not in by_us_alone), _OURS)


@cache
def based(ours: type, base: str, package: str) -> Any:
    """Ours as a class of that package, with its `LightningModule` or another base."""
    if problem := _problem(package):
        raise SetupError(problem)
    return type(ours.__name__, (ours, getattr(import_module(package), base)), {"__doc__": ours.__doc__})
