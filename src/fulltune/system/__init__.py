"""Hardware, memory, the run folder, several machines, and the parallel layout."""
