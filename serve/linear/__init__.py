"""vLLM's linear layers with pruned or quantized weights."""
