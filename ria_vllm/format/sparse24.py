"""The 2:4 tensor: a dense matrix in which each group of four consecutive columns keeps two values.

Stored form of an [out, in] matrix, as in compressed-tensors' `sparse-24-bitmask`:

- `compressed` [out, in/2], the matrix's dtype: the two kept values of each group, in column order;
- `bitmask` [out, in/8] uint8: bit i of byte b (least significant first) is set where column 8b+i is kept.

A group with fewer than two non-zeros still stores two values, so both shapes are fixed.
"""

import torch

VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
IN_FEATURES_MULTIPLE = 64

# Elements that `decompress` makes at a time: its indices have eight bytes each.
_BLOCK = 1 << 20


def compress(dense: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Store a 2:4 matrix.

    Args:
        dense: [out, in], in a multiple of 8.
        mask: bool [out, in], exactly two True in each group of four. Without it the two largest magnitudes of each
            group are kept (the left one of equals), which loses nothing if the matrix is 2:4 already.

    Returns:
        compressed [out, in/2] and bitmask [out, in/8] uint8.

    Raises:
        ValueError: wrong shape, or a group of `mask` without exactly two True.
    """
    if dense.dim() != 2 or dense.shape[1] % 8:
        raise ValueError(f"a 2:4 matrix needs two dimensions and columns in multiples of 8, not {tuple(dense.shape)}")
    rows, columns = dense.shape
    if mask is None:
        magnitude = dense.abs() if dense.is_floating_point() else dense.short().abs()  # -128 has no int8 magnitude
        kept = magnitude.reshape(rows, columns // 4, 4).sort(dim=-1, descending=True, stable=True).indices[..., :2]
        mask = torch.zeros(rows, columns // 4, 4, dtype=torch.bool, device=dense.device)
        mask = mask.scatter_(-1, kept, True).view(rows, columns)
    if mask.shape != dense.shape or not bool((mask.reshape(rows, -1, 4).sum(-1) == 2).all()):
        raise ValueError("a 2:4 mask has the matrix's shape and exactly two kept values in each group of four")
    bits = mask.reshape(rows, columns // 8, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return dense[mask].view(rows, columns // 2), bits.sum(-1, dtype=torch.uint8)


def mask_from_bitmask(bitmask: torch.Tensor) -> torch.Tensor:
    """bool [out, in] from `bitmask` uint8 [out, in/8]."""
    bits = (bitmask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bitmask.device)) & 1
    return bits.to(torch.bool).flatten(-2)


def decompress(compressed: torch.Tensor, bitmask: torch.Tensor) -> torch.Tensor:
    """The dense [out, in] matrix, columns in the stored order. The bitmask must have passed `check_bitmask`.

    No shape depends on a value and nothing moves between devices, so a CUDA graph may capture it.
    """
    rows, columns = bitmask.shape[0], bitmask.shape[1] * 8
    bits = torch.arange(256, device=bitmask.device)[:, None] >> torch.arange(8, device=bitmask.device) & 1
    # For each byte: which of its four values, or the zero behind them, each of its eight columns gets.
    source = torch.where(bits == 1, bits.cumsum(-1) - 1, 4)
    dense = compressed.new_empty(rows, columns)
    step = max(1, _BLOCK // max(1, columns))
    for first in range(0, rows, step):
        block = slice(first, first + step)
        values = torch.nn.functional.pad(compressed[block].unflatten(1, (-1, 4)), (0, 1))
        dense[block] = values.gather(-1, source[bitmask[block].int()]).flatten(1)
    return dense


def check_bitmask(bitmask: torch.Tensor, shape: tuple[int, int] | None = None) -> str | None:
    """What is wrong with a stored bitmask, or None. Nothing may read one from a file before it has passed.

    Checks its dtype, its shape against `shape` (out, in), and that each group of four has exactly two bits set.
    """
    if bitmask.dtype != torch.uint8:
        return f"the bitmask has dtype {bitmask.dtype}, expected uint8"
    if bitmask.dim() != 2:
        return f"the bitmask has shape {tuple(bitmask.shape)}, expected a matrix"
    rows, columns = bitmask.shape[0], bitmask.shape[1] * 8
    if shape is not None and (rows, columns) != tuple(shape):
        return f"the bitmask describes a {rows} x {columns} matrix, expected {shape[0]} x {shape[1]}"
    if rows == 0:
        return "the matrix has no rows"
    if columns == 0 or columns % IN_FEATURES_MULTIPLE:
        return f"in-features are {columns}, expected a multiple of {IN_FEATURES_MULTIPLE}"
    # Every byte holds two groups; 36 of its 256 values have two bits in both.
    legal = torch.tensor([bin(b & 15).count("1") == 2 and bin(b >> 4).count("1") == 2 for b in range(256)])
    present = torch.bincount(bitmask.reshape(-1).cpu(), minlength=256) > 0
    if bool((present & ~legal).any()):
        bad = (~legal.to(bitmask.device)[bitmask.long()]).nonzero()[0].tolist()
        return (
            f"row {bad[0]}, columns {8 * bad[1]} to {8 * bad[1] + 7}: a group of four without exactly two kept values"
        )
    return None
