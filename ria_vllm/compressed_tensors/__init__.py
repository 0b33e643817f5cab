"""2:4 checkpoints that compressed-tensors and llm-compressor wrote: what their tensors mean, in our weight formats."""
