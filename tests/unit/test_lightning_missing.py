"""Without Lightning, or with one that is too old, the import says what to install."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

import pytest

from fulltune.errors import SetupError


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, r"needs lightning 2\.5 or newer, found none; pip install -U 'fulltune\[lightning\]'"),
        ("2.4.0", r"needs lightning 2\.5 or newer, found 2\.4\.0; pip install -U 'fulltune\[lightning\]'"),
        ("1.9.5", "found 1.9.5"),
    ],
)
def test_missing_or_old_lightning_is_refused(found: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        assert name in ("lightning", "pytorch_lightning")
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    for name in [name for name in sys.modules if name.startswith("fulltune.lightning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(SetupError, match=said):
        importlib.import_module("fulltune.lightning")
