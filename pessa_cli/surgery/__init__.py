"""The passes over a checkpoint: measure, plan, rewrite, and write the output with its manifest and card."""
