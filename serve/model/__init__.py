"""What vLLM knows about a checkpoint, and which of the model's layers serves which part of it."""
