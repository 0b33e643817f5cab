"""Activations rounded to int8 or fp8, token by token: what a linear with `input_activations` computes with."""

from typing import Any

import torch

LARGEST = 127
FP8_DTYPE = torch.float8_e4m3fn
LARGEST_FP8 = torch.finfo(FP8_DTYPE).max  # 448


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers of each token and its scale, all computed in float32: x ~ integers * scale.

    A token is multiplied by 127 / its largest magnitude (at most the largest float32) and rounded, halves to even.

    Args:
        x: [..., K], any floating dtype.

    Returns:
        float32 [..., K], integers from -127 to 127, with NaN where a token has a NaN or an infinity; and float32
        [..., 1], which is 1 for a token of zeros.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    whole = torch.full_like(largest, LARGEST)  # torch divides by, and into, a plain number with two roundings
    # 127 / largest overflows for tiny tokens, and 0 * inf would be NaN.
    factor = (whole / largest).clamp(max=torch.finfo(torch.float32).max)
    integers = (x * torch.where(largest == 0, 0.0, factor)).round().clamp(-LARGEST, LARGEST)
    return integers, torch.where(largest == 0, 1.0, largest / whole)


def quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x ~ values * scales with one scale per row, which maps the row's largest magnitude to 448 (e4m3's largest).

    Args:
        x: [..., in], any floating dtype. A row with an infinity or a NaN becomes NaN.

    Returns:
        values float8_e4m3fn [..., in] and scales float32 [...], positive.
    """
    x = x.float()
    scales = (x.abs().amax(-1, keepdim=True) / LARGEST_FP8).clamp(min=torch.finfo(torch.float32).tiny)
    # Rounding may take the quotient past 448, and devices differ in how they cast such values.
    values = (x / scales).clamp(-LARGEST_FP8, LARGEST_FP8).to(FP8_DTYPE)
    return values, scales.squeeze(-1)


def round_tokens(x: torch.Tensor, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """Each token [K] of x as its values in `dtype` (int8 or float8_e4m3fn) and its scale give it back, in x's dtype.

    Gradients pass unchanged, as if nothing had been rounded.
    """
    return _RoundTokens.apply(x, dtype)


class _RoundTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if dtype == FP8_DTYPE:
            values, scales = quantize_fp8(x)
            return (values.float() * scales[..., None]).to(x.dtype)
        integers, scales = quantize_tokens(x)
        return (integers * scales).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None
