"""The settings of a run with their reasons, one after another."""

from __future__ import annotations

from typing import Any

from fulltune.records.plan import Setting

FROM_RECIPE = "from the recipe"


class Reasons:
    """Each setting with its value and why it has it."""

    def __init__(self) -> None:
        self.settings: list[Setting] = []

    def add(self, name: str, given: Any, chosen: Any = None, reason: str = "") -> Any:
        """The recipe's value if it gave one, else the chosen one."""
        value, why = (given, FROM_RECIPE) if given is not None else (chosen, reason)
        self.settings.append(Setting(name=name, value=value, reason=why, chosen=given is None))
        return value

    def replace(self, name: str, value: Any, reason: str) -> None:
        """Another value for a setting that was chosen before."""
        place = next(i for i, setting in enumerate(self.settings) if setting.name == name)
        self.settings[place] = Setting(name=name, value=value, reason=reason, chosen=True)
