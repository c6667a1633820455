"""Audits the rows of a run without changing them."""
