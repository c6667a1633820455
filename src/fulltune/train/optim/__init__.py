"""Optimizers with small states."""
