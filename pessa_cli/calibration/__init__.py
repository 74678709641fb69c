"""Collecting calibration statistics: one pass of real data through a model."""
