"""The tensors of a checkpoint on their way into vLLM's layers, at the start and in reloads."""
