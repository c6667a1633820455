"""Drift, replay and the budget for forgetting."""
