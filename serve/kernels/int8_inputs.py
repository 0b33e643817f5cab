"""Products whose inputs are rounded to int8, one token at a time: what every kernel with `input_dtype` computes.

Of a token x [K], in float32 and with each operation rounded on its own:

    largest = max |x|
    inverse = 127 / largest
    q = clamp(round(x * inverse), -127, 127), halves to even
    scale = largest / 127

A token of zeros, or one so small that `inverse` is infinite, has q = 0 and scale = 1. The order of the input's channels
does not matter. For each row of the weight, and each of its groups of columns in ascending order (a row with one scale
is one group):

    y = 0
    y = y + float32(sum of q * value over the group's columns) * weight_scale
    y = y * scale + bias, rounded to the activations' dtype at the end

The sums are exact, because they are sums of integers; where one exceeds 2^24, float32 rounds it to nearest. So all
kernels give the same bits. A token with a NaN or an infinity has no defined result.
"""

from collections.abc import Mapping

import torch
from torch.nn.functional import pad

from ria_vllm import sparse24
from ria_vllm.formats import IntFormat


def round_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> the integers q in float64, and the scales float32 [..., 1]."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    inverse = 127 / largest
    is_zero = inverse.isinf()
    rounded = (x * inverse).round().clamp(-127, 127)
    return rounded.masked_fill(is_zero, 0).double(), (largest / 127).masked_fill(is_zero, 1)


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
    q, scale = round_tokens(x)
    # Their sums are exact in float64.
    values = sparse24.decompress(weight_format.integers(parts), parts["bitmask"]).double()
    q = pad(q, (0, values.shape[1] - q.shape[-1]))
    weight_scales = parts["weight_scale"].float()
    width = values.shape[1] // weight_scales.shape[1]
    y = scale.new_zeros(*x.shape[:-1], len(values))
    for group, of_rows in enumerate(weight_scales.unbind(1)):
        columns = slice(group * width, (group + 1) * width)
        sums = torch.nn.functional.linear(q[..., columns], values[:, columns])
        y += sums.float() * of_rows
    y *= scale
    return y if bias is None else y + bias.float()
