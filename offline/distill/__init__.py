"""Recovery: train the weights that pruning kept towards the dense model's predictions."""
