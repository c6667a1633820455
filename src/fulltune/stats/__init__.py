"""Statistics: bootstrap, intervals, calibration, metrics as sums over rows."""
