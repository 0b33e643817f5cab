"""The product in torch operations alone, for any device, dtype and weight format: the fallback, and a test oracle."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ria_vllm.format.formats import FORMATS
from ria_vllm.format.pattern import PATTERNS, Pattern
from ria_vllm.serve.kernels import int8_inputs
from ria_vllm.serve.kernels.base import LinearLayerConfig, cannot_decode

# Rows decompressed at a time: the temporary stays small beside the weight.
_BLOCK_ROWS = 1024

_library = torch.library.Library("ria", "FRAGMENT")
_library.define(
    "sparse24_linear.reference(Tensor x, Tensor[] packed, str format_name, bool rounds_input,"
    " int out_features, Tensor? input_permutation, Tensor? bias) -> Tensor"
)


def _linear(
    x: torch.Tensor,
    packed: list[torch.Tensor],
    format_name: str,
    rounds_input: bool,
    out_features: int,
    input_permutation: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    weight_format = FORMATS[format_name]
    parts = {part.name: tensor for part, tensor in zip(weight_format.parts, packed, strict=True)}
    y = x.new_empty(*x.shape[:-1], out_features)
    if input_permutation is not None:
        x = x.index_select(-1, input_permutation)
    x = x.float()
    for first in range(0, out_features, _BLOCK_ROWS):
        rows = slice(first, first + _BLOCK_ROWS)
        block, of_rows = weight_format.take_rows(parts, rows), None if bias is None else bias[rows]
        y[..., rows] = int8_inputs.product(x, weight_format, block, of_rows, rounds_input)
    return y


_library.impl("sparse24_linear.reference", _linear, "CompositeExplicitAutograd")


@torch.library.register_fake("ria::sparse24_linear.reference")
def _fake_linear(
    x: torch.Tensor, packed: object, format_name: str, rounds_input: bool, out_features: int, *_: object
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


class ReferenceKernel:
    """See `LinearKernel`."""

    name: ClassVar[str] = "reference"
    is_fallback: ClassVar[bool] = True
    patterns: ClassVar[tuple[Pattern, ...]] = tuple(PATTERNS.values())

    @staticmethod
    def is_supported(device: torch.device) -> str | None:
        return None

    @staticmethod
    def can_implement(config: LinearLayerConfig) -> str | None:
        return cannot_decode(config)

    @staticmethod
    def pack(config: LinearLayerConfig, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The format's own tensors."""
        return tuple(parts[part.name].clone() for part in config.weight_format.parts)

    @staticmethod
    def apply(
        config: LinearLayerConfig,
        x: torch.Tensor,
        packed: Sequence[torch.Tensor],
        input_permutation: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return torch.ops.ria.sparse24_linear.reference(
            x,
            list(packed),
            config.weight_format.name,
            config.input_dtype is not None,
            config.out_features,
            input_permutation,
            bias,
        )
