"""The product in torch operations alone: any device, any dtype. The fallback, and what the tests call right."""

from collections.abc import Sequence

import torch

from ria_vllm import sparse24

NAME = "reference"

# Rows decompressed at a time: the temporary stays small beside the weight.
_BLOCK_ROWS = 1024

_library = torch.library.Library("ria", "FRAGMENT")
_library.define(
    "sparse24_linear.reference(Tensor x, Tensor compressed, Tensor bitmask, Tensor? scales, Tensor? input_permutation,"
    " Tensor? bias) -> Tensor"
)


def _linear(x, compressed, bitmask, scales, input_permutation, bias):
    y = x.new_empty(*x.shape[:-1], compressed.shape[0])
    if input_permutation is not None:
        x = x.index_select(-1, input_permutation)
    x = x.float()
    for first in range(0, compressed.shape[0], _BLOCK_ROWS):
        rows = slice(first, first + _BLOCK_ROWS)
        block = sparse24.decompress(compressed[rows], bitmask[rows]).float()
        if scales is not None:
            block *= scales[rows, None]
        y[..., rows] = torch.nn.functional.linear(x, block, None if bias is None else bias[rows].float())
    return y


_library.impl("sparse24_linear.reference", _linear, "CompositeExplicitAutograd")


@torch.library.register_fake("ria::sparse24_linear.reference")
def _fake_linear(x, compressed, bitmask, scales, input_permutation, bias):
    return x.new_empty(*x.shape[:-1], compressed.shape[0])


def unavailable(device: torch.device, dtype: torch.dtype, out_features: int, in_features: int) -> str | None:
    """Why this backend cannot serve a layer, or None."""
    if dtype not in (*sparse24.VALUE_DTYPES, torch.int8):
        return f"no 2:4 weights of dtype {dtype}"
    return None


def pack(
    compressed: torch.Tensor, bitmask: torch.Tensor, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """The checkpoint's form is the packed form; copies, so that the originals can be freed."""
    return tuple(tensor.clone() for tensor in (compressed, bitmask, scales) if tensor is not None)


def apply(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    out_features: int,
    input_permutation: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """y[..., out] = x[..., p] @ stored^T + bias, accumulated in fp32, in x's dtype."""
    compressed, bitmask, *scales = packed
    scale = scales[0] if scales else None
    return torch.ops.ria.sparse24_linear.reference(x, compressed, bitmask, scale, input_permutation, bias)
