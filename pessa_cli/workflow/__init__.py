"""One command as one function, for the command line and for Python: open a model, calibrate, plan, write, verify."""
