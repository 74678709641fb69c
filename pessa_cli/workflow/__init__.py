"""One command as one function: open a model, calibrate, plan, write, verify; recipes, and what they may hold."""
