"""The records that runs and comparisons write to disk, from which alone reports are made."""
