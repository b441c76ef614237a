"""Training on answers: examples, loss, loop and checkpoints, shared by LoRA, distillation and experts."""
