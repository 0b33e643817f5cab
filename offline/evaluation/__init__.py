"""How good a model is: perplexity, benchmark tasks, and the report on a compression."""
