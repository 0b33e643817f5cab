"""vLLM's mixture-of-experts layers with pruned or quantized experts."""
