"""vLLM's reloads of a running model: watched, agreed upon by all ranks, checked, and undone where they fail."""
