"""Rows through a model, reduced batch by batch."""
