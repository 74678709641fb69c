"""Fine-tuning: adapter methods, training, and merging adapters into a checkpoint."""
