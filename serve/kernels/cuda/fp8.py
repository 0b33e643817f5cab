"""Rounding activations to fp8 (e4m3), one scale a token, in plain torch operations that torch.compile can fuse."""

import torch

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max  # 448


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x ~ values * scales, one scale a row: its largest magnitude becomes 448, the rest is rounded to e4m3.

    Args:
        x: [..., in], any floating dtype. A row with an infinity or NaN becomes NaN.

    Returns:
        values float8_e4m3fn [..., in] and scales float32 [...], positive.
    """
    x = x.float()
    scales = (x.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    # The quotient may exceed 448 by a rounding, and what the cast makes of that differs between devices.
    values = (x / scales).clamp(-LARGEST, LARGEST).to(DTYPE)
    return values, scales.squeeze(-1)
