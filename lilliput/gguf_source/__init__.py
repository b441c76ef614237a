"""A GGUF file as source model: reads it, copies its hyperparameters to transformers, and checks the result."""
