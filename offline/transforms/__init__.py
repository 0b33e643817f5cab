"""Mathematics of what is done before pruning: permutations, rotations, SmoothQuant's scales."""
