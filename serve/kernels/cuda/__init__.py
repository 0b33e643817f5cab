"""The product on NVIDIA GPUs, by our own kernels."""
