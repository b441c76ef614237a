"""llama.cpp's server: its process, and its chat completions."""
