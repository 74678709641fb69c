"""Where models come from: every supported format becomes a Hugging Face folder."""
