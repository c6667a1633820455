"""One attempt, in a process of its own."""
