"""Our own kernels for NVIDIA GPUs."""
