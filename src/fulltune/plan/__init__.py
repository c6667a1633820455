"""The plan stage: every number of a trial, each with its reason. Pure: no torch, no weights."""

from fulltune.plan.fit import fit

__all__ = ["fit"]
