"""Records that runs and comparisons write to disk. Reports read nothing else."""
