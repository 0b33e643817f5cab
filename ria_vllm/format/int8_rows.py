"""Dense matrices in int8: linears that stay dense where pruned ones have integers (`RiaSchema.int8_linears`); and
heads and input embeddings there.

NAME.integers, int8 [out, in], and NAME.weight_scale, float32 [out, 1], stand in the place of NAME.weight: a weight is
its integer times the scale of its row. Inputs of heads are not rounded, or to two int8 numbers, which loses next to
nothing.
"""

from collections.abc import Iterator, Mapping

import torch

from ria_vllm.format.formats import INT8

INTEGERS, SCALE = "integers", "weight_scale"
TENSORS = (INTEGERS, SCALE)
COLUMNS_MULTIPLE = 64
"""Of the columns: what kernels take."""
ROWS_AT_ONCE = 4096


def encode(weight: torch.Tensor, scales: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The stored tensors of a matrix [out, in], of any floating dtype.

    Args:
        scales: float32 [out, 1]; None: those that fit the rows' largest magnitudes.
    """
    if scales is None:
        scales = torch.cat([INT8.scales_of(weight[rows]) for rows in _blocks(weight)])
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in _blocks(weight):
        integers[rows] = (weight[rows].float() / scales[rows]).round().clamp(INT8.smallest, INT8.largest)
    return {INTEGERS: integers, SCALE: scales}


def decode(parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """[out, in], each product rounded once."""
    integers, scales = parts[INTEGERS], parts[SCALE]
    found = torch.empty(integers.shape, dtype=dtype, device=integers.device)
    for rows in _blocks(integers):
        found[rows] = widened(integers[rows], scales[rows], dtype)
    return found


def widened(integers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Some rows [..., in] of a matrix, with their scales [..., 1]. Nothing in this depends on how many there are, so a
    traced graph may have it."""
    return (integers.float() * scales).to(dtype)


def _blocks(matrix: torch.Tensor) -> Iterator[slice]:
    """All rows, so many at a time that float32 temporaries stay small."""
    return (slice(start, start + ROWS_AT_ONCE) for start in range(0, len(matrix), ROWS_AT_ONCE))


def fault(part: str, tensor: torch.Tensor, columns: int | None = None) -> str | None:
    """Why a tensor is not what is stored under this name, or None."""
    dtype, width = (torch.int8, columns) if part == INTEGERS else (torch.float32, 1)
    if tensor.dtype != dtype or tensor.dim() != 2 or 0 in tensor.shape or width not in (None, tensor.shape[1]):
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
