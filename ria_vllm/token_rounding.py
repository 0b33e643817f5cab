"""Activations rounded to int8, token by token: what a linear with `input_activations` computes with."""

from typing import Any

import torch

LARGEST = 127


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
    # 127 / largest overflows for tiny tokens, and 0 * inf would be NaN.
    factor = (LARGEST / largest).clamp(max=torch.finfo(torch.float32).max)
    integers = (x * torch.where(largest == 0, 0.0, factor)).round().clamp(-LARGEST, LARGEST)
    return integers, torch.where(largest == 0, 1.0, largest / LARGEST)


def round_tokens(x: torch.Tensor) -> torch.Tensor:
    """Each token [K] of x as its integers and its scale give it back, in the dtype of x.

    Gradients pass unchanged, as if nothing had been rounded.
    """
    return _RoundTokens.apply(x)


class _RoundTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        integers, scales = quantize_tokens(x)
        return (integers * scales).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]
