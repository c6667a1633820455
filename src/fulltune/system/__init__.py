"""This machine and its files: hardware, the run folder, memory, what is shared out."""
