"""The `pessa` command: options, commands, recipes, and everything that prints."""
