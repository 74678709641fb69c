"""Checkpoint folders as files: safetensors, JSON, hashes, and folders that are complete or absent."""
