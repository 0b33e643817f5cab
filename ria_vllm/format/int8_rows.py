"""Dense matrices in int8: a head, and the embedding that is tied to it, where pruned linears round their inputs.

NAME.integers, int8 [out, in], and NAME.weight_scale, float32 [out, 1], stand in the place of NAME.weight: a weight is
its integer times the scale of its row. Inputs are not rounded, or to two int8 numbers, which loses next to nothing.
"""

from collections.abc import Mapping

import torch

from ria_vllm.format.formats import INT8

INTEGERS, SCALE = "integers", "weight_scale"
TENSORS = (INTEGERS, SCALE)
COLUMNS_MULTIPLE = 64
"""Of the columns: what kernels take."""
ROWS_AT_ONCE = 4096


def encode(weight: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of a matrix [out, in], of any floating dtype, rounded by `scales`, float32 [out, 1]."""
    integers = (weight.float() / scales).round().clamp(INT8.smallest, INT8.largest).to(torch.int8)
    return {INTEGERS: integers, SCALE: scales}


def decode(parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """[out, in], each product rounded once."""
    integers, scales = parts[INTEGERS], parts[SCALE]
    found = torch.empty(integers.shape, dtype=dtype, device=integers.device)
    for start in range(0, len(found), ROWS_AT_ONCE):  # so that float32 temporaries stay small
        rows = slice(start, start + ROWS_AT_ONCE)
        found[rows] = integers[rows].float() * scales[rows]
    return found


def fault(part: str, tensor: torch.Tensor, columns: int | None = None) -> str | None:
    """Why a tensor is not what is stored under this name, or None."""
    dtype, width = (torch.int8, columns) if part == INTEGERS else (torch.float32, 1)
    if tensor.dtype != dtype or tensor.dim() != 2 or width not in (None, tensor.shape[1]):
        return f"{tensor.dtype} {tuple(tensor.shape)}, expected {dtype} [out, {width or 'in'}]"
    if part == SCALE and not bool((tensor.isfinite() & (tensor > 0)).all()):
        return "a scale is not a positive finite number"
    return None


def problem(parts: Mapping[str, torch.Tensor]) -> str | None:
    """Why these tensors, by the last parts of their names, are no matrix in int8, or None."""
    for part in TENSORS:
        if part not in parts:
            return f"{part} is missing"
        if reason := fault(part, parts[part]):
            return f"{part}: {reason}"
    return None if len(parts[INTEGERS]) == len(parts[SCALE]) else f"{SCALE} has not one number for each row"
