"""Training on answers, shared by the strategies `lora`, `distill` and `experts`."""
