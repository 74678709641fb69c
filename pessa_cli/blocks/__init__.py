"""Which attention blocks a checkpoint has: the table of architectures, discovery, and the compact format."""
