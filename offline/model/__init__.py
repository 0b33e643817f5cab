"""The dense model: opening it, naming and streaming its tensors, and how its linears depend on each other."""
