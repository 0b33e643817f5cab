"""Routed experts from the plan to the files: which are pruned, by what tokens, and how they are stored."""
