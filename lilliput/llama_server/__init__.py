"""llama.cpp's server: its process, and the chat completions that it speaks."""
