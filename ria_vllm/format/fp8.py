"""Activations in fp8 (e4m3), one scale per token, in plain torch operations that torch.compile can fuse."""

import torch

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max  # 448


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x ~ values * scales with one scale per row, which maps the row's largest magnitude to 448 (e4m3's largest).

    Args:
        x: [..., in], any floating dtype. A row with an infinity or a NaN becomes NaN.

    Returns:
        values float8_e4m3fn [..., in] and scales float32 [...], positive.
    """
    x = x.float()
    scales = (x.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    # Rounding may take the quotient past 448, and devices differ in how they cast such values.
    values = (x / scales).clamp(-LARGEST, LARGEST).to(DTYPE)
    return values, scales.squeeze(-1)
