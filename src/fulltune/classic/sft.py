from __future__ import annotations

import copy
import importlib.util
from typing import Any

from fulltune.classic.arguments import OldNames, issue_notice
from fulltune.classic.trainer import Trainer
from fulltune.errors import SetupError

if importlib.util.find_spec("trl") is None:
    raise SetupError("fulltune.SFTTrainer: needs the package trl; pip install 'fulltune[trl]'")

import trl  # after the refusal


class SFTConfig(OldNames, trl.SFTConfig):
    """`trl.SFTConfig` with `OldNames` and `max_seq_length`, TRL's name before 0.20."""

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        if "max_seq_length" in keywords:
            keywords["max_length"] = keywords.pop("max_seq_length")
            issue_notice(f"max_seq_length is now max_length={keywords['max_length']!r}")
        super().__init__(*positional, **keywords)


class SFTTrainer(Trainer, trl.SFTTrainer):
    """`trl.SFTTrainer` with fulltune's guards (see `Trainer`)."""

    _metrics: dict[str, dict[str, list[float]]]
    _total_train_tokens: int
    _loss_scaling_known = True  # TRL divides the loss by itself

    def before_first_step(self) -> None:
        """Run the dry-run step without changing TRL's token count and metrics."""
        metrics, tokens = copy.deepcopy(self._metrics), self._total_train_tokens
        super().before_first_step()
        self._metrics, self._total_train_tokens = metrics, tokens
