"""Guards of a whole run that judge no curve (those are in `stats/curves.py`), and the rate after going back."""

from __future__ import annotations

from collections.abc import Sequence

from fulltune.records.training import Moved
from fulltune.stats.curves import GO_ON, GuardDecision
from fulltune.text import format_seconds, parse_seconds


def nothing_learned(moved: Moved, reached: bool, largest_grad_norm: float | None) -> GuardDecision:
    """Stop when no parameter changed: no gradient reached one, each gradient was 0, or the rate was too small."""
    if moved.num_values_moved > 0:
        return GO_ON
    if not reached:
        reason = "no parameter received a gradient: does the loss depend on the model?"
    elif moved.num_tensors_with_gradient == 0 or largest_grad_norm == 0:
        reason = (
            "every gradient was 0, so no parameter moved: the loss does not change with the model's outputs (a loss "
            "that is multiplied by 0, or from which all rows or tokens are dropped)"
        )
    else:
        reason = "no parameter moved: the learning rate is too small for the weights' type, or the run too short"
    return GuardDecision("stop", reason)


def too_short(notice: str | None, stop_seconds: float) -> str:
    """That a run which is told to stop cannot save in time; empty: it can, or nobody has said how long it has."""
    if notice is None or stop_seconds <= parse_seconds(notice):
        return ""
    return (
        f"train.notice: {notice} is less than a step, an evaluation and a checkpoint take (about "
        f"{format_seconds(stop_seconds)}): a run that is told to stop may lose the steps since its last checkpoint; a "
        "smaller train.save_steps makes them few"
    )


RATE_SHARE = 0.5
"""Of the rate that is kept each time that a run goes back, but for the first time."""


def rate_factor(rollbacks: Sequence[int]) -> float:
    """What the planned rate is multiplied by after rollbacks to these steps: a half for each but a first one to a
    checkpoint, because most causes pass (docs/guards.md)."""
    passed = bool(rollbacks) and rollbacks[0] > 0
    return float(RATE_SHARE ** (len(rollbacks) - passed))
