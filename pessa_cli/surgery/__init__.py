"""The passes over a checkpoint: decompose its blocks, cut them to a rank plan, and write the output with manifest."""
