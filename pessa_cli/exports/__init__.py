"""Other programs' formats: ONNX and openai-whisper."""
