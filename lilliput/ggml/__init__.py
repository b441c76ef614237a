"""The types of GGUF files: llama.cpp's rules for them, its own quantiser, and checkpoints that hold their blocks."""
