"""The kernels of pruned linears: an operator, `ria::sparse24_linear`, with an overload for each."""
