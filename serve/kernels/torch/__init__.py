"""Kernels that torch contains."""
