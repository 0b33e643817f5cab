"""The pruned model in training, and its sparse parameters."""
