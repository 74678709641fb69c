"""Helpers that every other package may import: errors, progress, message text, threads and optional packages."""
