"""The attention blocks of a checkpoint: the architecture table, their discovery, and the compact format."""
