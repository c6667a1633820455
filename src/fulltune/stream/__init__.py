"""Runs and trains models whose weights stay on a disk, unit by unit."""
