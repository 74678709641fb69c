"""Compact models at run time: linear layers, attention kernels, and the loaders of transformers and openai-whisper."""
