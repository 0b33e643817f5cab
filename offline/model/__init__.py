"""The dense model: opening it, its tensors by name, one layer at a time, what its linears are to each other."""
