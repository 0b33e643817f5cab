"""vLLM's MoE layers with pruned or quantized experts."""
