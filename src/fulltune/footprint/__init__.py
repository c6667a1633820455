"""Trace a training step's memory and work without the model's weights."""
