"""The `pessa` command: its options, its commands, and everything that prints."""
