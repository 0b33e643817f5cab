"""How the W8A8 linear that vLLM has for this CPU adds up."""

import torch

from benchmarks import cpu_dense


def saturate(dtype: torch.dtype) -> bool:
    """Whether it adds up the products of two neighbours in 16 bits, where large ones saturate: oneDNN without VNNI."""
    y = cpu_dense.w8a8(torch.ones(32, 64), dtype)(torch.ones(1, 64, dtype=dtype))
    return bool(((y - 64).abs() > 1).any())
