"""Routed experts from the plan to the files: which are pruned, by what tokens, how they are trained and stored."""
