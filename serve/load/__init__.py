"""The tensors of a checkpoint on their way into vLLM's layers."""
