"""The plan for hardware that is not here, and what else would fit."""
