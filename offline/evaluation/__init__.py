"""How good a model is: perplexity and benchmark tasks."""
