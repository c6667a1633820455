"""Drift, replay and the budget for forgetting in a training."""
