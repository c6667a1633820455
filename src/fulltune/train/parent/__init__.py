"""Starts attempts from the parent process."""
