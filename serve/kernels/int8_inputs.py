"""Products whose inputs are rounded to int8, one token at a time: what every kernel with `input_dtype` computes.

Of a token x [K], `ria_vllm.format.token_rounding.quantize_tokens` computes, in float32 and with each operation rounded
on its own:

    largest = max |x|
    factor = min(127 / largest, the largest float32)
    q = clamp(round(x * factor), -127, 127), halves to even
    scale = largest / 127

A token of zeros has q = 0 and scale = 1. The order of the input's channels does not matter. For each row of the weight,
and each of its groups of columns in ascending order (a row with one scale is one group):

    y = 0
    y = y + float32(sum of q * value over the group's columns) * weight_scale
    y = y * scale + bias, rounded to the activations' dtype at the end

The sums are exact, because they are sums of integers; where one exceeds 2^24, float32 rounds it to nearest. Where the
scales of a row are multiples of one number, a kernel may add up value * multiple and multiply by that number once: its
float32 roundings are fewer then. A token with a NaN or an infinity has no defined result.
"""

from collections.abc import Mapping

import torch
from torch.nn.functional import pad

from ria_vllm.format import sparse24
from ria_vllm.format.formats import IntFormat
from ria_vllm.format.token_rounding import quantize_tokens
from ria_vllm.format.weight_format import WeightFormat


def product(
    x: torch.Tensor,
    weight_format: WeightFormat,
    parts: Mapping[str, torch.Tensor],
    bias: torch.Tensor | None,
    rounds_input: bool,
) -> torch.Tensor:
    """The product in float32, [..., N], with or without rounding its input; see `linear` for the arguments."""
    if rounds_input:
        assert isinstance(weight_format, IntFormat)
        return linear(x, weight_format, parts, bias)
    weight = weight_format.decode(parts, torch.float32)[:, : x.shape[-1]]
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())


def linear(
    x: torch.Tensor, weight_format: IntFormat, parts: Mapping[str, torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    """The product in float32, [..., N].

    No shape depends on a value, so a CUDA graph may capture it.

    Args:
        x: [..., K], K at most the weight's columns; the rest of these are padding.
        parts: of a weight with N rows.
        bias: [N], or None.
    """
    q, scale = quantize_tokens(x)
    # Sums of integers are exact in float64.
    values = sparse24.decompress(weight_format.integers(parts), parts["bitmask"]).double()
    q = pad(q.double(), (0, values.shape[1] - q.shape[-1]))
    weight_scales = parts["weight_scale"].float()
    width = values.shape[1] // weight_scales.shape[1]
    y = scale.new_zeros(*x.shape[:-1], len(values))
    for group, of_rows in enumerate(weight_scales.unbind(1)):
        columns = slice(group * width, (group + 1) * width)
        sums = torch.nn.functional.linear(q[..., columns], values[:, columns])
        y += sums.float() * of_rows
    y *= scale
    return y if bias is None else y + bias.float()
