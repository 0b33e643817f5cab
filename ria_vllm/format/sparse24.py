"""The 2:4 tensor: a dense matrix in which each group of four consecutive columns keeps two values; 4:8 and 8:16 alike.

Stored form of an [out, in] matrix, as in compressed-tensors' `sparse-24-bitmask`:

- `compressed` [out, in/2], the matrix's dtype: the kept values, in column order;
- `bitmask` [out, in/8] uint8: bit i of byte b (least significant first) is set where column 8b+i is kept.

A group with fewer non-zeros still stores as many values, so both shapes are fixed.
"""

import torch

from ria_vllm.format.pattern import TWO_OF_FOUR, Pattern

VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
IN_FEATURES_MULTIPLE = 64

# Elements that `decompress` makes at a time: its indices have eight bytes each.
_BLOCK = 1 << 20
# And that `compress_pruned` gathers: their positions have eight bytes each.
_GATHERED = 1 << 22


def compress(
    dense: torch.Tensor, mask: torch.Tensor | None = None, pattern: Pattern = TWO_OF_FOUR
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store a matrix.

    Args:
        dense: [out, in], in a multiple of 8 and of the pattern's groups.
        mask: bool [out, in], in the pattern. Without it the largest magnitudes of each group are kept (the left one of
            equals), which loses nothing if the matrix has the pattern already.

    Returns:
        compressed [out, in/2] and bitmask [out, in/8] uint8.

    Raises:
        ValueError: wrong shape, or a group of `mask` that does not keep as many as the pattern.
    """
    multiple = max(8, pattern.of)
    if dense.dim() != 2 or dense.shape[1] % multiple:
        raise ValueError(
            f"a {pattern} matrix needs two dimensions and columns in multiples of {multiple}, not {tuple(dense.shape)}"
        )
    rows, columns = dense.shape
    groups = (rows, columns // pattern.of, pattern.of)
    if mask is None:
        magnitude = dense.abs() if dense.is_floating_point() else dense.short().abs()  # -128 has no int8 magnitude
        kept = magnitude.reshape(groups).sort(dim=-1, descending=True, stable=True).indices[..., : pattern.kept]
        mask = torch.zeros(groups, dtype=torch.bool, device=dense.device).scatter_(-1, kept, True).view(rows, columns)
    if mask.shape != dense.shape or not bool((mask.reshape(groups).sum(-1) == pattern.kept).all()):
        raise ValueError(f"a {pattern} mask has the matrix's shape; this one has another, or {pattern.group}")
    bits = mask.reshape(rows, columns // 8, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return dense[mask].view(rows, columns // 2), bits.sum(-1, dtype=torch.uint8)


def _kept_of(pattern: int) -> int:
    """Four bits, two of them set: the columns to keep of those whose bits in `pattern` are not zero; 0 if too many are.

    Of fewer than two, the leftmost zeros are kept too.
    """
    columns = [i for i in range(4) if pattern >> i & 1]
    columns += [i for i in range(4) if i not in columns][: max(0, 2 - len(columns))]
    return sum(1 << i for i in columns) if len(columns) == 2 else 0


# By the non-zeros of eight columns: which to keep, 0 if some group of four has too many.
_BITMASK = torch.tensor(
    [_kept_of(b & 15) | _kept_of(b >> 4) << 4 if _kept_of(b & 15) and _kept_of(b >> 4) else 0 for b in range(256)],
    dtype=torch.uint8,
)
# By a byte of a bitmask: the columns of its four values.
_COLUMNS = torch.tensor([([i for i in range(8) if byte >> i & 1] + [0] * 4)[:4] for byte in range(256)])


def compress_pruned(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Compressed values and bitmask of a matrix that may be 2:4 already.

    Args:
        dense: [out, in] of any dtype, `in` in multiples of 8.

    Returns:
        compressed [out, in/2] and bitmask uint8 [out, in/8]; None if some group of four has three non-zeros or more.
    """
    bitmask = bitmask_of(dense)
    if bitmask is None:
        return None
    rows, columns = dense.shape
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dense.itemsize]  # torch gathers these, but not fp8
    compressed, positions = dense.new_empty(rows, columns // 2), _COLUMNS.to(dense.device)
    for block in _blocks(rows, columns, _GATHERED):
        values = dense[block].contiguous().view(whole).unflatten(1, (-1, 8))
        compressed[block] = values.gather(-1, positions[bitmask[block].int()]).flatten(1).view(dense.dtype)
    return compressed, bitmask


def bitmask_of(dense: torch.Tensor, pattern: Pattern = TWO_OF_FOUR) -> torch.Tensor | None:
    """uint8 [out, in/8] of what is not zero and, where a group has fewer, of its leftmost zeros; None if some group of
    the pattern has too many."""
    rows, columns = dense.shape
    bitmask = dense.new_empty(rows, columns // 8, dtype=torch.uint8)
    kept = _BITMASK.to(dense.device)
    for block in _blocks(rows, columns, _GATHERED):
        if pattern != TWO_OF_FOUR:
            flags = (dense[block] != 0).to(torch.int8)
            if bool((flags.unflatten(1, (-1, pattern.of)).sum(-1) > pattern.kept).any()):
                return None
            bitmask[block] = compress(flags, None, pattern)[1]
            continue
        bitmask[block] = kept[_bits((dense[block] != 0).contiguous()).int()]
        if not bool(bitmask[block].all()):
            return None
    return bitmask


def _blocks(rows: int, columns: int, elements: int) -> list[slice]:
    """Blocks of rows that have at most so many elements, but one row at least."""
    step = max(1, elements // max(1, columns))
    return [slice(first, first + step) for first in range(0, rows, step)]


def _bits(flags: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in/8] from bool [out, in]: eight to a byte, the first in the lowest bit."""
    words = flags.view(torch.int64)  # one byte of 0 or 1 for each
    for distance, mask in ((7, 0x0003000300030003), (14, 0x0000000F0000000F), (28, 0xFF)):
        words = (words | words >> distance) & mask  # pairs, then fours, then all eight move together
    return words.to(torch.uint8)


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
    # Two bytes have eight values in every pattern; an odd number of bytes is not 8:16, so that each has four.
    size = 2 - bitmask.shape[1] % 2
    # For each byte: which of its values, or the zero behind those of two bytes, each of its eight columns gets.
    source, counts = torch.where(bits == 1, bits.cumsum(-1) - 1, 8), bits.sum(-1)
    dense = compressed.new_empty(rows, columns)
    for block in _blocks(rows, columns, _BLOCK):
        values = torch.nn.functional.pad(compressed[block].unflatten(1, (-1, 4 * size)), (0, 1))
        numbers = bitmask[block].int().unflatten(1, (-1, size))
        chosen = source[numbers]
        chosen[:, :, 1:] += counts[numbers[:, :, :-1, None]]
        dense[block] = values.gather(-1, chosen.flatten(2).clamp_(max=4 * size)).flatten(1)
    return dense


def check_bitmask(
    bitmask: torch.Tensor, shape: tuple[int, int] | None = None, pattern: Pattern = TWO_OF_FOUR
) -> str | None:
    """What is wrong with a stored bitmask, or None. Nothing may read one from a file before it has passed.

    Checks its dtype, its shape against `shape` (out, in), and that each group has exactly as many bits set as the
    pattern keeps.
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
    if wrong := _wrong_groups(bitmask, pattern):
        row, first = wrong
        return f"row {row}, columns {first} to {first + max(8, pattern.of) - 1}: {pattern.group}"
    return None


def _wrong_groups(bitmask: torch.Tensor, pattern: Pattern) -> tuple[int, int] | None:
    """The row and the first column of the first byte, or group of more bytes, that does not have the pattern."""
    if pattern.of > 8:
        counts = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8, device=bitmask.device)
        groups = counts[bitmask.int()].unflatten(1, (-1, pattern.of // 8)).sum(-1, dtype=torch.uint8)
        bad = groups != pattern.kept
        if not bool(bad.any()):
            return None
    else:
        in_byte, ones = range(0, 8, pattern.of), (1 << pattern.of) - 1
        legal = torch.tensor(
            [all(bin(byte >> at & ones).count("1") == pattern.kept for at in in_byte) for byte in range(256)]
        )
        present = torch.bincount(bitmask.reshape(-1).cpu(), minlength=256) > 0
        if not bool((present & ~legal).any()):
            return None
        bad = ~legal.to(bitmask.device)[bitmask.long()]
    row, group = bad.nonzero()[0].tolist()
    return row, group * max(8, pattern.of)
