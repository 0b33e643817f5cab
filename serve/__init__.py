"""Stage 2: the vLLM plugin that serves compressed 2:4 checkpoints."""
