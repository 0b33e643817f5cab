"""From a plain weight with its zeros to the kept values of each group, if it has a pattern."""

from collections.abc import Iterator

import torch

from ria_vllm.format import sparse24
from ria_vllm.format.pattern import TWO_OF_FOUR, Pattern

# Elements at a time: the positions that are gathered have eight bytes each.
_BLOCK = 1 << 22


def _kept(pattern: int) -> int:
    """Four bits, two of them set: the columns to keep of those whose bits in `pattern` are not zero; 0 if too many are.

    Of fewer than two, the leftmost zeros are kept too.
    """
    columns = [i for i in range(4) if pattern >> i & 1]
    columns += [i for i in range(4) if i not in columns][: max(0, 2 - len(columns))]
    return sum(1 << i for i in columns) if len(columns) == 2 else 0


# By the non-zeros of eight columns: which to keep, 0 if some group of four has too many.
_BITMASK = torch.tensor(
    [_kept(b & 15) | _kept(b >> 4) << 4 if _kept(b & 15) and _kept(b >> 4) else 0 for b in range(256)],
    dtype=torch.uint8,
)
# By a byte of a bitmask: the columns of its four values.
_COLUMNS = torch.tensor([([i for i in range(8) if byte >> i & 1] + [0] * 4)[:4] for byte in range(256)])


def compress(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Compressed values and bitmask, as in `ria_vllm.format.sparse24`, of a matrix that may be 2:4.

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
    for block in _blocks(dense):
        values = dense[block].contiguous().view(whole).unflatten(1, (-1, 8))
        compressed[block] = values.gather(-1, positions[bitmask[block].int()]).flatten(1).view(dense.dtype)
    return compressed, bitmask


def bitmask_of(dense: torch.Tensor, pattern: Pattern = TWO_OF_FOUR) -> torch.Tensor | None:
    """uint8 [out, in/8] of what is not zero and, where a group has fewer, of its leftmost zeros; None if some group of
    the pattern has too many."""
    bitmask = dense.new_empty(len(dense), dense.shape[1] // 8, dtype=torch.uint8)
    kept = _BITMASK.to(dense.device)
    for block in _blocks(dense):
        if pattern != TWO_OF_FOUR:
            flags = (dense[block] != 0).to(torch.int8)
            if bool((flags.unflatten(1, (-1, pattern.of)).sum(-1) > pattern.kept).any()):
                return None
            bitmask[block] = sparse24.compress(flags, None, pattern)[1]
            continue
        bitmask[block] = kept[_bits((dense[block] != 0).contiguous()).int()]
        if not bool(bitmask[block].all()):
            return None
    return bitmask


def _blocks(dense: torch.Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, dense.shape[1]))
    return (slice(first, first + step) for first in range(0, len(dense), step))


def _bits(flags: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in/8] from bool [out, in]: eight to a byte, the first in the lowest bit."""
    words = flags.view(torch.int64)  # one byte of 0 or 1 for each
    for distance, mask in ((7, 0x0003000300030003), (14, 0x0000000F0000000F), (28, 0xFF)):
        words = (words | words >> distance) & mask  # pairs, then fours, then all eight move together
    return words.to(torch.uint8)
