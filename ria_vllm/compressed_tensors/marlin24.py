"""compressed-tensors' `marlin-24`: 2:4 integers in the order in which the GPU kernel Marlin-24 reads them.

For a linear [out, in], `out` in multiples of 64 and `in` of 32, it stores three tensors:

- `weight_packed` int32 [in/32, out * bits/2]: the two kept values of each group of four columns, plus 2^(bits-1). Each
  32-bit word holds 32/bits of them, the first in its lowest bits. They are in tiles of 64 rows and 16 kept columns; in
  a tile, each of the 32 threads of a warp finds what it multiplies side by side.
- `meta` int16 [in/32, 2 * out]: four bits for each group of four columns, the two positions that are kept, the first
  in the lower two bits. One number covers 16 columns. The numbers are in CUTLASS's order for sparse products of 16
  bits.
- `scale_packed` [1, out], one for each row, or [in/128, out]. In the second, the scales of 8 rows are interleaved: 0,
  4, 1, 5, 2, 6, 3, 7. compressed-tensors leaves them in order if `in` is 256 or less.

The orders below were derived from the writer in compressed-tensors 0.12 (`compressors/sparse_quantized_compressors/
marlin_24.py`); the tests compare with it.
"""

from collections.abc import Mapping

import torch

from ria_vllm.format.formats import INTEGERS, IntFormat
from ria_vllm.format.sparse24 import VALUE_DTYPES

TENSORS = ("weight_packed", "scale_packed", "meta")
GROUP_SIZE = 128
FORMATS = tuple(INTEGERS[bits, size] for bits in (4, 8) for size in (None, GROUP_SIZE))

_ROWS = 64
_COLUMNS = 32


def unpack(tensors: Mapping[str, torch.Tensor], weight_format: IntFormat) -> dict[str, torch.Tensor]:
    """The parts of `weight_format` that a linear's three tensors stand for, bit for bit.

    Args:
        tensors: the three of `TENSORS`, as they come from a file: nothing in them is trusted.
        weight_format: one of `FORMATS`.

    Returns:
        `compressed`, `bitmask`, and `weight_scale` in the dtype of `scale_packed`.

    Raises:
        ValueError: a wrong dtype or shape, positions that are not 2:4, or a scale that is not finite; names the tensor.
    """
    out_features, in_features = _shape(tensors, weight_format)
    values = _values(tensors["weight_packed"], weight_format.num_bits, out_features, in_features)
    return {
        "compressed": weight_format.pack(values),
        "bitmask": _bitmask(tensors["meta"], out_features, in_features),
        "weight_scale": _scales(tensors["scale_packed"], in_features),
    }


def _shape(tensors: Mapping[str, torch.Tensor], weight_format: IntFormat) -> tuple[int, int]:
    """(out, in), of which all three tensors tell the same."""
    for name, dtypes in zip(TENSORS, ((torch.int32,), VALUE_DTYPES, (torch.int16,))):
        tensor = tensors[name]
        if tensor.dtype not in dtypes or tensor.dim() != 2:
            wanted = " or ".join(map(str, dtypes))
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, expected a matrix of {wanted}")
    tiles, out_features = len(tensors["weight_packed"]), tensors["scale_packed"].shape[1]
    in_features, group = tiles * _COLUMNS, weight_format.group_size
    if not tiles or not out_features or out_features % _ROWS or (group and in_features % group):
        raise ValueError(
            f"weight_packed: {tuple(tensors['weight_packed'].shape)} for {out_features} rows, which is no whole number "
            f"of tiles{' and groups' if group else ''}"
        )
    shapes = (
        (tiles, out_features * weight_format.num_bits // 2),
        (in_features // group if group else 1, out_features),
        (tiles, 2 * out_features),
    )
    for name, shape in zip(TENSORS, shapes):
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{name}: shape {tuple(tensors[name].shape)}, expected {shape} for a {out_features} x {in_features} "
                "matrix"
            )
    return out_features, in_features


def _values(packed: torch.Tensor, num_bits: int, out_features: int, in_features: int) -> torch.Tensor:
    """The kept values, int8 [out, in/2]."""
    stored = packed.contiguous().view(torch.uint8)
    if num_bits == 4:
        stored = torch.stack([stored & 15, stored >> 4], -1)
    # In a tile, a row's number has the digits (outer, side, half, lane) to the bases (4, 2, 2, 4), and a column's the
    # digits (upper, pair, second) to the bases (2, 4, 2). Stored is (outer, side, pair, lane) and then the other three.
    digits = stored.view(in_features // _COLUMNS, out_features // _ROWS, 4, 2, 4, 4, 2, 2, 2)
    # The last three: (second, half, upper) with four bits, (half, second, upper) with eight.
    order = (1, 2, 3, 7, 5, 0, 8, 4, 6) if num_bits == 4 else (1, 2, 3, 6, 5, 0, 8, 4, 7)
    values = digits.permute(order).reshape(out_features, in_features // 2)
    return (values ^ 128).view(torch.int8) if num_bits == 8 else values.to(torch.int8) - 8


def _bitmask(meta: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """`bitmask`, uint8 [out, in/8]."""
    # A row's number in its tile of 64 is (eighth, upper, odd pair, second) of the bases (8, 2, 2, 2).
    digits = meta.reshape(in_features // _COLUMNS, out_features // _ROWS, 2, 8, 2, 2, 2)
    numbers = digits.permute(1, 3, 6, 2, 4, 0, 5).reshape(out_features, in_features // 16)
    bitmask = _BITS.to(meta.device)[numbers.view(torch.uint8).int()]
    if not bool(bitmask.all()):
        row, byte = (bitmask == 0).nonzero()[0].tolist()
        raise ValueError(f"meta: row {row}, columns {8 * byte} to {8 * byte + 7}: not two positions in each four")
    return bitmask


def _scales(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """`weight_scale` [out, 1 or in/128]."""
    if not bool(packed.isfinite().all()):
        raise ValueError("scale_packed: a scale is not a finite number")
    if len(packed) > 1 and in_features > 2 * GROUP_SIZE:
        packed = packed.unflatten(1, (-1, 4, 2)).transpose(2, 3).flatten(1)
    return packed.t().contiguous()


def _bits_of(two_groups: int) -> int:
    """The byte of a bitmask for eight bits of `meta`; 0 if they are not two different positions in ascending order."""
    found = 0
    for group in (0, 1):
        first, second = two_groups >> 4 * group & 3, two_groups >> 4 * group + 2 & 3
        if first >= second:
            return 0
        found |= (1 << first | 1 << second) << 4 * group
    return found


_BITS = torch.tensor([_bits_of(byte) for byte in range(256)], dtype=torch.uint8)
