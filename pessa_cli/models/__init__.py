"""Loading models with transformers, reading audio and data, encoding inputs, and hooks on attention blocks."""
