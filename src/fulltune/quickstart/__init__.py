"""The example: its data from docstrings, its recipes."""
