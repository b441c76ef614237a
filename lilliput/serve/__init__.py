"""What stands between a question and a model: answers that need not be made again."""
