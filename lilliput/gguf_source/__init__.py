"""A GGUF file as source model: reads it, carries its hyperparameters over to transformers, checks the result."""
