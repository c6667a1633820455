"""Bootstrap, intervals, precision, calibration and training curves."""
