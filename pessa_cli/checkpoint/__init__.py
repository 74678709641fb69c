"""Reading and writing of checkpoint folders: safetensors, JSON, hashes, and outputs that appear only when complete."""
