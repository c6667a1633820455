"""Attempts, as the process sees them that starts the workers."""
