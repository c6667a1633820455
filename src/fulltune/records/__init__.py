"""What is written to disk: the records of a run and of a comparison. Reports read these alone."""
