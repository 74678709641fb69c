"""Calibration statistics of attention blocks: the sums, their file, and the weightings that follow from them."""
