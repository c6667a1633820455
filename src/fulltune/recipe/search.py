"""The recipe's block `search`: what else than the learning rate is tried, and for how long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, model_validator

from fulltune.recipe.block import Block
from fulltune.text import parse_seconds

_OWN = ("budget", "trials", "settings")


class SearchBlock(Block):
    """Whole runs with other settings, the best by the eval rows: `search: {train.num_train_epochs: [2, 4, 8]}`."""

    budget: str | None = None
    """Most time that a search may take in all, such as `20m`; the run at the best settings is part of it."""
    trials: int = Field(default=12, ge=2)
    """Whole runs at most, besides one with the recipe's own settings. Where the values make no more combinations than
    that each is tried, else Optuna draws some, which needs the extra `search`."""
    settings: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Settings of the blocks `method` and `train`, each with two or more values, written beside the other keys:
    `{train.num_train_epochs: [2, 4], method.layerwise_lr_decay: [0.9, 1.0]}`."""

    @model_validator(mode="before")
    @classmethod
    def _gather_settings(cls, values: Any) -> Any:
        """Names with a dot, and blocks inside the block as `--set` makes them, become `settings`."""
        if not isinstance(values, dict):
            return values
        own = {name: value for name, value in values.items() if name in _OWN}
        more = {name: value for name, value in values.items() if name not in _OWN}
        found = {name: value for name, value in _flat(more) if "." in name}
        problems = [
            f"{name}: expected a list of values, found {value!r}; write [{value}, ...]"
            for name, value in found.items()
            if not isinstance(value, (list, tuple))
        ]
        if problems:
            raise ValueError("\n".join(problems))
        unknown = {name: value for name, value in more.items() if "." not in str(name) and not isinstance(value, dict)}
        if found and isinstance(own.get("settings", {}), dict):
            own["settings"] = {**own.get("settings", {}), **found}
        return {**own, **unknown}

    @model_validator(mode="after")
    def _must_be_usable(self) -> SearchBlock:
        problems = []
        if self.budget is not None:
            try:
                parse_seconds(self.budget)
            except ValueError as error:
                problems.append(f"budget: {error}")
        for name, values in self.settings.items():
            if not name.startswith(("method.", "train.")):
                problems.append(f"{name}: only settings of 'method' and 'train' can be searched")
            twice = next((value for place, value in enumerate(values) if value in values[:place]), None)
            if twice is not None:
                problems.append(f"{name}: names {twice} twice")
            elif len(values) < 2:
                problems.append(f"{name}: expected two or more values, found {list(values)}")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _flat(values: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
