"""Random pruned layers for the tests of kernels."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ria_vllm.format import sparse24
from ria_vllm.format.formats import FLOAT
from ria_vllm.format.pattern import TWO_OF_FOUR, Pattern
from ria_vllm.format.weight_format import WeightFormat
from ria_vllm.serve.kernels.base import LinearKernel, LinearLayerConfig


@dataclass(frozen=True)
class PackedLayer:
    """A weight in a kernel's own form."""

    kernel: type[LinearKernel]
    config: LinearLayerConfig
    packed: tuple[torch.Tensor, ...]

    def __call__(self, x, input_permutation=None, bias=None):
        return self.kernel.apply(self.config, x, self.packed, input_permutation, bias)


def pack(
    kernel,
    parts: Mapping[str, torch.Tensor],
    format: WeightFormat = FLOAT,
    act_dtype=None,
    input_dtype=None,
    pattern: Pattern = TWO_OF_FOUR,
) -> PackedLayer:
    """`act_dtype`: by default that of float weights."""
    rows, columns = parts["bitmask"].shape[0], parts["bitmask"].shape[1] * 8
    act_dtype = act_dtype or parts["compressed"].dtype
    config = LinearLayerConfig(parts["bitmask"].device, act_dtype, format, rows, columns, input_dtype, pattern)
    return PackedLayer(kernel, config, kernel.pack(config, parts))


def random_parts(
    rows: int, columns: int, format: WeightFormat = FLOAT, dtype=torch.bfloat16, seed: int = 0, pattern=TWO_OF_FOUR
):
    """The parts of a random weight, and the dense [rows, columns] in float64 that they mean."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    mask = sparse24.mask_from_bitmask(sparse24.compress(weight, None, pattern)[1])
    weight, scales = format.quantize((weight * mask).to(dtype), dtype)
    parts = format.encode(weight, mask, scales, pattern)
    return parts, format.decode(parts, torch.float32).double()
