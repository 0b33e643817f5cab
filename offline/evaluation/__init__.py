"""How good a model is: perplexity, tasks, the report."""
