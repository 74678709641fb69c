"""Running compact models: linear layers, bucketed attention, and loaders for transformers and openai-whisper."""
