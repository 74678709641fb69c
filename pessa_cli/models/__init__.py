"""Loaded models: loading, inputs, hooks on their blocks, audio and data."""
