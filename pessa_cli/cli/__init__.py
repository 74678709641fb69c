"""The `pessa` command: its subcommands, their options, and the only module that prints."""
