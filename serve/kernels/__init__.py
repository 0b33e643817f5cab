"""The products of 2:4 weights: one operator, `ria::sparse24_linear`, with an overload for each backend."""
