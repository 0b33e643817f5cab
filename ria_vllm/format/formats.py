"""Weight formats: what the stored tensors of a 2:4 linear mean.

A linear [out, in] is stored as one tensor for each of its format's `parts`, named NAME.PART, and NAME.shape. Rows are
in the model's own order and columns in the stored one. `bitmask` says which half of each group of columns is kept
(see `ria_vllm.format.sparse24`); the other parts hold their values:

| format | `compressed`            | `weight_scale` | bits per weight, with the bitmask |
| ------ | ----------------------- | -------------- | --------------------------------- |
| float  | the model's own dtype   | -              | 9 at 16 bits, 17 at 32            |
| int8   | int8                    | one per row    | 5                                 |
| int4   | two values in a uint8   | one per row    | 3                                 |
| int8-gG, int4-gG | as int8, int4 | one per G stored columns of a row | 16/G more      |
| fp8    | float8_e4m3fn           | one per row    | 5                                 |

An operation on a linear is applied to each of its parts, as `Part` describes them. A permutation of rows takes the rows
of all parts. A tensor-parallel cut of the columns cuts the parts that have columns; one scale per row stays whole on
every rank. Padding appends `Part.fill`. A permutation of columns changes no part, because a format encodes columns that
are permuted already; where `group_size` is None, the scales do not depend on it.

Everything that reads, writes or multiplies weights asks the format. To add one, write a class here; a kernel for it
makes it fast.
"""

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from ria_vllm.format import sparse24
from ria_vllm.format.weight_format import BITMASK, ROW_SCALE, Part, Parts, WeightFormat


class FloatFormat(WeightFormat):
    """The model's own dtype."""

    name = "float"
    parts = (Part("compressed", sparse24.VALUE_DTYPES, 2), BITMASK)

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, scales: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        return weight.to(dtype), None

    def encode_kept(
        self, values: torch.Tensor, bitmask: torch.Tensor, scales: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        return {"compressed": values, "bitmask": bitmask}

    def values(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        return parts["compressed"].to(dtype)


class RoundedFormat(WeightFormat):
    """weight ~ value * scale, with values of few bits, and scales that are positive.

    Attributes:
        largest: the largest value.
        smallest: the smallest value that `quantize` gives.
        spacing: the largest distance between neighbouring values.
        scale_dtype: of the scales that `quantize` makes.
        largest_multiple: of a row's unit that the scale of a group may be; None: any scale will do.
    """

    largest: float
    smallest: float
    spacing: float
    scale_dtype = torch.float32
    largest_multiple: int | None = None

    @abstractmethod
    def round_(self, scaled: torch.Tensor) -> torch.Tensor:
        """Round weights that were divided by their scales, float32 of any shape, to the nearest values, in place."""

    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, scales: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scales = self.scales_of(weight) if scales is None else scales
        return self.nearest(weight, scales).to(dtype), scales

    def scales_of(self, weight: torch.Tensor) -> torch.Tensor:
        """The scales that fit the largest magnitudes, or of int4 groups the next multiples of the row's unit; [out, 1]
        or [out, in / group_size], positive.

        Args:
            weight: [out, in], in the stored order.
        """
        scales = weight.float().unflatten(1, (-1, self.group_size or weight.shape[1])).abs().amax(-1) / self.largest
        scales = scales.to(self.scale_dtype)
        return torch.where(scales > 0, scales, 1.0)

    def units_of(self, scales: torch.Tensor) -> torch.Tensor | None:
        """float32 [out, 1]: the numbers of which 1 to `largest_multiple` times are scales that can be stored, the
        largest one no smaller than any of a row's. Those of `scales_of` are such multiples. None: any scale will do.

        Args:
            scales: [out, groups], not negative.
        """
        return None

    def storable(self, scales: torch.Tensor, units: torch.Tensor | None = None) -> torch.Tensor:
        """The nearest scales that `quantize` can make, in `scale_dtype`.

        Args:
            scales: [out, 1] or [out, some of the groups], positive.
            units: those of the rows, if the format has any; None: of `scales`, which are whole rows. If these are
                multiples of some already, they stay as they are.
        """
        return scales.to(self.scale_dtype)

    def nearest(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """float32: all values of a matrix, or only the kept ones, rounded to the nearest that these scales can hold."""
        wide = wide_scales(scales, values.shape[1])
        return self.round_(values.float() / wide).mul_(wide)


class IntFormat(RoundedFormat):
    """Symmetric integers: weight ~ value * scale, off by at most half a scale if the scale fits the largest magnitude.

    That is before the product is rounded to the model's dtype.

    Four bits are stored two to a byte, the first value in the low one; n stands for n - 8. So the bytes, read as
    little-endian int32, are what compressed-tensors' `pack_to_int32` makes of the kept values.

    Scales of groups are bfloat16, which has the exponents of float32: in float16, those of small weights would be
    subnormal, or zero. In four bits, those of a row are multiples of one number, its unit: so value * multiple is an
    int8, and a kernel that rounds its inputs to int8 needs floating point only at a row's end. (Lin et al., "QServe",
    2024, has such integer scales below those of rows.) That is what this class makes; `values` takes any scales.

    Attributes:
        num_bits: 4 or 8.
    """

    spacing = 1.0

    def __init__(self, num_bits: int, group_size: int | None = None):
        """`group_size`: one of `GROUP_SIZES`; None: a scale belongs to a whole row."""
        self.num_bits = num_bits
        self.largest = 2 ** (num_bits - 1) - 1
        self.smallest = -8 if num_bits == 4 else -self.largest
        self.name = f"int{num_bits}" + (f"-g{group_size}" if group_size else "")
        compressed = (
            Part("compressed", (torch.int8,), 2) if num_bits == 8 else Part("compressed", (torch.uint8,), 4, fill=0x88)
        )
        scale = Part("weight_scale", sparse24.VALUE_DTYPES, group_size, fill=1) if group_size else ROW_SCALE
        self.parts = (compressed, BITMASK, scale)
        self.scale_dtype = torch.bfloat16 if group_size else torch.float32
        strategy = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
        self.quantization = strategy | {"symmetric": True, "num_bits": num_bits, "type": "int"}
        self.largest_multiple = 15 if group_size and num_bits == 4 else None  # 15 * -8 is an int8

    @property
    def lowest(self) -> int:
        """The smallest value that a checkpoint may hold: -8 or -128."""
        return -(2 ** (self.num_bits - 1))

    def round_(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.round_().clamp_(self.smallest, self.largest)

    def scales_of(self, weight: torch.Tensor) -> torch.Tensor:
        if self.largest_multiple is None:
            return super().scales_of(weight)
        fitting = weight.float().unflatten(1, (-1, self.group_size)).abs().amax(-1) / self.largest
        units = self.units_of(fitting)
        multiples = (fitting / units).ceil().clamp_(1, self.largest_multiple)
        # So that the units of what is returned are these.
        multiples = torch.where(multiples == multiples.amax(1, keepdim=True), self.largest_multiple, multiples)
        return (units * multiples).to(self.scale_dtype)

    def units_of(self, scales: torch.Tensor) -> torch.Tensor | None:
        if self.largest_multiple is None:
            return None
        # Of four bits, as multiples have: bfloat16 holds their products.
        mantissas, exponents = torch.frexp(scales.float().amax(1, keepdim=True) / self.largest_multiple)
        units = torch.ldexp((mantissas * 16).ceil() / 16, exponents)
        return torch.where(units > 2.0**-120, units, 1.0)

    def storable(self, scales: torch.Tensor, units: torch.Tensor | None = None) -> torch.Tensor:
        if self.largest_multiple is None:
            return super().storable(scales)
        found = self._divisors(scales) if units is None else units
        multiples = (scales.float() / found).round().clamp_(1, self.largest_multiple)
        return (found * multiples).to(self.scale_dtype)

    def _divisors(self, scales: torch.Tensor) -> torch.Tensor:
        """Units of which a row's scales are multiples; its `units_of` where there is none."""
        assert self.largest_multiple is not None
        found = self.units_of(scales)
        exact = scales.double()  # so that products below are
        least = exact.amin(1, keepdim=True)
        for divisor in range(self.largest_multiple, 0, -1):
            units = (least / divisor).float()
            multiples = (exact * divisor / least).round_()
            fits = (multiples <= self.largest_multiple) & (multiples * least == exact * divisor)
            fits &= (units.double() * divisor == least) & (torch.frexp(units).mantissa * 16 % 1 == 0)
            found = torch.where(fits.all(1, keepdim=True), units, found)
        return found

    def written_dtype(self, part: Part, dtype: torch.dtype) -> torch.dtype:
        return self.scale_dtype if part.name == "weight_scale" else super().written_dtype(part, dtype)

    def encode_kept(
        self, values: torch.Tensor, bitmask: torch.Tensor, scales: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        assert scales is not None
        # `values` gives the same weights back: where they are so small that rounding to float16 moved them by more than
        # half a step, steps are smaller than the distances between numbers of float16, and the nearest one will do.
        scaled = values.float() / wide_scales(scales, values.shape[1])
        integers = scaled.round_().clamp_(self.lowest, self.largest).to(torch.int8)
        return {"compressed": self.pack(integers), "bitmask": bitmask, "weight_scale": scales}

    def pack(self, integers: torch.Tensor) -> torch.Tensor:
        """`compressed` of kept values, int8 [out, in/2], all of them within the format's bits."""
        return integers if self.num_bits == 8 else _packed(integers)

    def integers(self, parts: Parts) -> torch.Tensor:
        """The kept values as int8 [out, in/2], without their scales."""
        stored = parts["compressed"]
        return stored if self.num_bits == 8 else _unpacked(stored)

    def values(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        integers = self.integers(parts)
        return (integers.float() * wide_scales(parts["weight_scale"], integers.shape[1])).to(dtype)


def wide_scales(scales: torch.Tensor, columns: int) -> torch.Tensor:
    """float32 scales of each of a row's `columns`, [out, columns]; or [out, 1] if the whole row has one.

    Args:
        scales: [out, 1] or [out, groups], of any floating dtype. The columns are all of the row's or only its kept
            ones: each group has equally many.
    """
    scales = scales.float()
    return scales if scales.shape[1] == 1 else scales.repeat_interleave(columns // scales.shape[1], 1)


def _packed(values: torch.Tensor) -> torch.Tensor:
    """uint8 [out, n/2] from int8 [out, n] of four bits."""
    pairs = (values + 8).to(torch.uint8).unflatten(1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def _unpacked(pairs: torch.Tensor) -> torch.Tensor:
    """int8 [out, n] from what `_packed` makes of it."""
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(1).to(torch.int8) - 8


class Fp8Format(RoundedFormat):
    """float8_e4m3fn, a scale per row."""

    name = "fp8"
    parts = (Part("compressed", (torch.float8_e4m3fn,), 2), BITMASK, ROW_SCALE)
    quantization: Mapping[str, Any] | None = MappingProxyType(
        {"strategy": "channel", "symmetric": True, "num_bits": 8, "type": "float"}
    )
    largest = torch.finfo(torch.float8_e4m3fn).max
    smallest = -largest
    spacing = 32.0

    def round_(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.copy_(self._stored(scaled))

    def encode_kept(
        self, values: torch.Tensor, bitmask: torch.Tensor, scales: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        assert scales is not None
        return {"compressed": self._stored(values.float() / scales), "bitmask": bitmask, "weight_scale": scales}

    def values(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        return (parts["compressed"].float() * parts["weight_scale"]).to(dtype)

    def _stored(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.clamp(self.smallest, self.largest).to(torch.float8_e4m3fn)


FLOAT, INT8, INT4, FP8 = FloatFormat(), IntFormat(8), IntFormat(4), Fp8Format()

GROUP_SIZES = (32, 64, 128)
"""How many stored columns of a row may share a scale; half of them are kept."""

INTEGERS: dict[tuple[int, int | None], IntFormat] = {
    (bits, size): IntFormat(bits, size) for bits in (8, 4) for size in (None, *GROUP_SIZES)
}
"""By `num_bits` and `group_size`."""

FORMATS: dict[str, WeightFormat] = {one.name: one for one in (FLOAT, *INTEGERS.values(), FP8)}
"""All formats, by name: what kernels may be asked for."""


def of_quantization(quantization: Mapping[str, Any] | None) -> WeightFormat | None:
    """The format that config.json describes in exactly these words; None if there is none."""
    return next((one for one in FORMATS.values() if one.quantization == quantization), None)
