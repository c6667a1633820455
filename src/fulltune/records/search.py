"""What a search for a run's settings found: kept as `search.json` in the run folder."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fulltune.records.base import Record
from fulltune.records.comparison import Search
from fulltune.records.scores import Estimate


class TriedSettings(Record):
    """One combination of settings, in a whole run."""

    name: str
    """Of its folder in `search`."""
    settings: dict[str, Any]
    """Dotted names to values; empty: the recipe's own."""
    metric: float
    """On the eval rows; NaN: it failed."""
    seconds: float
    problem: str = ""


class Searched(Record):
    """A search that ended."""

    trial: str
    """The run whose weights are kept, as it is called in `attempts` and `scores`."""
    place: str
    """The folder in which it was trained, relative to the run folder."""
    settings: dict[str, Any]
    own: dict[str, Any] = Field(default_factory=dict)
    """What the recipe, or else the plan, has for the settings that were searched."""
    reason: str
    metric_name: str
    greater_is_better: bool
    eval_rows: int
    rate: Search | None = None
    """How the learning rate was found; None: other settings were searched."""
    ceiling: float | None = None
    """The lowest rate above the chosen one at which a short trial diverged or was clearly worse; None: none was."""
    tried: tuple[TriedSettings, ...] = ()
    """Whole runs with other settings and with the recipe's own, the best first."""
    num_combinations: int = 0
    bought: Estimate | None = None
    """The metric on the test rows less that of the usual settings, trained with the same seed; None: they are the
    same, or were not trained."""
    confidence: float = 0.95
    """Level of that interval."""
    seconds: float
    """Of the whole search, the kept run included."""
    run_seconds: float
    budget_seconds: float | None = None
    time_was_up: bool = False

    @property
    def in_words(self) -> str:
        """What was chosen, and why."""
        chosen = ", ".join(f"{name} {value}" for name, value in self.settings.items()) or "the recipe's own settings"
        return f"search: taking {chosen}: {self.reason.removeprefix('searched: ')}"

    @property
    def cost(self) -> float:
        """In whole runs."""
        return self.seconds / self.run_seconds if self.run_seconds else 0.0
