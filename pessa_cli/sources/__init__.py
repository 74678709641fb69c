"""Model sources: every supported format, local or on the hub, becomes a Hugging Face folder."""
