"""Calibration statistics: their file, and what they say to the decomposition of a block."""
