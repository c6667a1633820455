"""A run whose settings are searched: several runs on the same rows, the best of which by the eval rows goes on."""

FOLDER = "search"
"""Inside the run folder: the trials, until the best one is moved into the run."""
