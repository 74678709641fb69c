"""One function for each command, for the command line and for Python: inspect, decompose, prune, export, verify."""
