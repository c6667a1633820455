"""Trains in attempts, each in a process of its own."""
