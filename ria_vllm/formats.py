"""Weight formats: what the stored tensors of a 2:4 linear mean.

A linear [out, in] is stored as one tensor for each of its format's `parts`, named NAME.PART, and NAME.shape. Rows are
in the model's own order and columns in the stored one. `bitmask` says which two columns of each group of four are kept
(see `ria_vllm.sparse24`); the other parts hold their values:

| format | `compressed`            | `weight_scale` | bits per weight, with the bitmask |
| ------ | ----------------------- | -------------- | --------------------------------- |
| float  | the model's own dtype   | -              | 9 at 16 bits, 17 at 32            |
| int8   | int8                    | one per row    | 5                                 |
| int4   | two values in a uint8   | one per row    | 3                                 |
| int8-gG, int4-gG | as int8, int4 | one per G stored columns of a row | 16/G more      |
| fp8    | float8_e4m3fn           | one per row    | 5                                 |

An operation on a linear is applied to each of its parts, as `Part` describes them. A row order takes the rows of all
parts. A tensor-parallel cut of the columns cuts the parts that have columns; one scale per row stays whole on every
rank. Padding appends `Part.fill`. A column permutation changes no part, because a format encodes columns that are in
the stored order already; where `group_size` is None, the scales do not depend on that order.

Everything that reads, writes or multiplies weights asks the format. To add one, write a class here; a kernel for it
makes it fast.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from ria_vllm import sparse24
from ria_vllm.weight_format import BITMASK, ROW_SCALE, Part, Parts, WeightFormat


class FloatFormat(WeightFormat):
    """The model's own dtype."""

    name = "float"
    parts = (Part("compressed", sparse24.VALUE_DTYPES, 2), BITMASK)

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, scales: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        return weight.to(dtype), None

    def encode(
        self, weight: torch.Tensor, mask: torch.Tensor | None, scales: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        compressed, bitmask = sparse24.compress(weight, mask)
        return {"compressed": compressed, "bitmask": bitmask}

    def values(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        return parts["compressed"].to(dtype)


class IntFormat(WeightFormat):
    """Symmetric integers: weight ~ value * scale, off by at most half a scale if the scale fits the largest magnitude.

    Four bits are stored two to a byte, the first value in the low one; n stands for n - 8. So the bytes, read as
    little-endian int32, are what compressed-tensors' `pack_to_int32` makes of the kept values.

    Attributes:
        num_bits: 4 or 8.
        scale_columns: stored columns that share a scale, see `GROUP_SIZES`; None: a scale belongs to a whole row. A
            row's is float32; those of groups have the model's dtype, or bfloat16 if that is float32.
    """

    def __init__(self, num_bits: int, scale_columns: int | None = None):
        self.num_bits, self.scale_columns = num_bits, scale_columns
        self.name = f"int{num_bits}" + (f"-g{scale_columns}" if scale_columns else "")
        compressed = (
            Part("compressed", (torch.int8,), 2) if num_bits == 8 else Part("compressed", (torch.uint8,), 4, fill=0x88)
        )
        scale = Part("weight_scale", sparse24.VALUE_DTYPES, scale_columns, fill=1) if scale_columns else ROW_SCALE
        self.parts = (compressed, BITMASK, scale)
        strategy = {"strategy": "group", "group_size": scale_columns} if scale_columns else {"strategy": "channel"}
        self.quantization = strategy | {"symmetric": True, "num_bits": num_bits, "type": "int"}

    @property
    def largest(self) -> int:
        """The largest value."""
        return 2 ** (self.num_bits - 1) - 1

    @property
    def smallest(self) -> int:
        """The smallest value that is written: -8 or -127. A checkpoint may also hold -128."""
        return -self.largest - 1 if self.num_bits == 4 else -self.largest

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, scales: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scales = self.scales_of(weight, dtype) if scales is None else scales
        return (self._rounded(weight, scales) * self._wide(scales, weight.shape[1])).to(dtype), scales

    def scales_of(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The scales that fit the largest magnitudes, [out, 1] or [out, in / scale_columns], positive.

        Args:
            weight: [out, in], in the stored order.
            dtype: of the model.
        """
        scales = weight.float().unflatten(1, (-1, self.scale_columns or weight.shape[1])).abs().amax(-1) / self.largest
        scales = scales.to(self.scale_dtype(dtype))
        return torch.where(scales > 0, scales, 1.0)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the scales of a model in `dtype`."""
        if self.scale_columns is None:
            return torch.float32
        return dtype if dtype.itemsize == 2 else torch.bfloat16

    def encode(
        self, weight: torch.Tensor, mask: torch.Tensor | None, scales: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        assert scales is not None
        compressed, bitmask = sparse24.compress(weight, mask)
        # Exact: rounding to the model's dtype moved no weight by as much as half a step.
        values = self._rounded(compressed, scales).to(torch.int8)
        return {"compressed": self.pack(values), "bitmask": bitmask, "weight_scale": scales}

    def pack(self, integers: torch.Tensor) -> torch.Tensor:
        """`compressed` of kept values, int8 [out, in/2], all of them within the format's bits."""
        return integers if self.num_bits == 8 else _packed(integers)

    def integers(self, parts: Parts) -> torch.Tensor:
        """The kept values as int8 [out, in/2], without their scales."""
        stored = parts["compressed"]
        return stored if self.num_bits == 8 else _unpacked(stored)

    def values(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        values = self.integers(parts).float()
        return (values * self._wide(parts["weight_scale"], values.shape[1])).to(dtype)

    def _rounded(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """float32 integers [out, n], where n is in or, for compressed weights, in/2."""
        scaled = weight.float() / self._wide(scales, weight.shape[1])
        return scaled.round().clamp(self.smallest, self.largest)

    def _wide(self, scales: torch.Tensor, count: int) -> torch.Tensor:
        """float32 scales of each of `count` columns of a row: [out, count], or [out, 1] for a row's."""
        scales = scales.float()
        return scales if self.scale_columns is None else scales.repeat_interleave(count // scales.shape[1], 1)


def _packed(values: torch.Tensor) -> torch.Tensor:
    """uint8 [out, n/2] from int8 [out, n] of four bits."""
    pairs = (values + 8).to(torch.uint8).unflatten(1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def _unpacked(pairs: torch.Tensor) -> torch.Tensor:
    """int8 [out, n] from what `_packed` makes of it."""
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(1).to(torch.int8) - 8


class Fp8Format(WeightFormat):
    """float8_e4m3fn, a scale per row. `compress` does not write it; checkpoints of compressed-tensors have it."""

    name = "fp8"
    parts = (Part("compressed", (torch.float8_e4m3fn,), 2), BITMASK, ROW_SCALE)
    quantization: Mapping[str, Any] | None = MappingProxyType(
        {"strategy": "channel", "symmetric": True, "num_bits": 8, "type": "float"}
    )
    largest = torch.finfo(torch.float8_e4m3fn).max

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, scales: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if scales is None:
            scales = weight.float().abs().amax(1, keepdim=True) / self.largest
            scales = torch.where(scales > 0, scales, 1.0)
        return (self._rounded(weight, scales).float() * scales).to(dtype), scales

    def encode(
        self, weight: torch.Tensor, mask: torch.Tensor | None, scales: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        assert scales is not None
        compressed, bitmask = sparse24.compress(weight, mask)
        return {"compressed": self._rounded(compressed, scales), "bitmask": bitmask, "weight_scale": scales}

    def values(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        return (parts["compressed"].float() * parts["weight_scale"]).to(dtype)

    def _rounded(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return (weight.float() / scales).clamp(-self.largest, self.largest).to(torch.float8_e4m3fn)


FLOAT, INT8, INT4, FP8 = FloatFormat(), IntFormat(8), IntFormat(4), Fp8Format()

GROUP_SIZES = (32, 64, 128)
"""How many stored columns of a row may share a scale; half of them are kept."""

INTEGERS: dict[tuple[int, int | None], IntFormat] = {
    (bits, size): IntFormat(bits, size) for bits in (8, 4) for size in (None, *GROUP_SIZES)
}
"""By `num_bits` and `scale_columns`."""

WRITTEN: dict[str, WeightFormat] = {one.name: one for one in (FLOAT, *INTEGERS.values())}
"""Those that `compress` writes, by name."""

FORMATS: dict[str, WeightFormat] = WRITTEN | {FP8.name: FP8}
"""All formats, by name: what kernels may be asked for."""


def of_quantization(quantization: Mapping[str, Any] | None) -> WeightFormat | None:
    """The format, of those in `WRITTEN`, that config.json describes in exactly these words; None if there is none."""
    return next((one for one in WRITTEN.values() if one.quantization == quantization), None)
