"""The kernels of 2:4 linears: one operator, `ria::sparse24_linear`, with an overload for each; another one for fp8."""
