"""Statistics: bootstrap, intervals, precision, calibration, and what the curves of a training say."""
