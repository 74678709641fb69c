"""Collecting calibration statistics by running calibration data through a model, and trial cuts of its blocks."""
