"""Pruned weights decompressed to dense ones, for devices that cannot multiply their pattern: RIA_VLLM_DENSE=1."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ria_vllm.format.formats import FLOAT
from ria_vllm.format.pattern import PATTERNS, Pattern
from ria_vllm.serve.kernels.base import LinearLayerConfig, cannot_decode, no_such_product


class DenseKernel:
    """See `LinearKernel`. It takes floating-point weights: others are widened to them, and no inputs are rounded."""

    name: ClassVar[str] = "dense"
    is_fallback: ClassVar[bool] = False
    patterns: ClassVar[tuple[Pattern, ...]] = tuple(PATTERNS.values())

    @staticmethod
    def is_supported(device: torch.device) -> str | None:
        return None

    @staticmethod
    def can_implement(config: LinearLayerConfig) -> str | None:
        if config.weight_format != FLOAT or config.input_dtype is not None:
            return no_such_product(config)
        return cannot_decode(config)

    @staticmethod
    def pack(config: LinearLayerConfig, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """One tensor, [out_features, in_features] in `act_dtype`."""
        return (config.weight_format.decode(parts, config.act_dtype),)

    @staticmethod
    def apply(
        config: LinearLayerConfig,
        x: torch.Tensor,
        packed: Sequence[torch.Tensor],
        input_permutation: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        if input_permutation is not None:
            x = x.index_select(-1, input_permutation)
        return torch.nn.functional.linear(x, packed[0], bias)
