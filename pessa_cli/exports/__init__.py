"""Exporting checkpoints to the formats of other programs: ONNX and openai-whisper."""
