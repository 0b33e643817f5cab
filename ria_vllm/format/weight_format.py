"""What every weight format answers; `ria_vllm.format.formats` has them all."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch

from ria_vllm.format import sparse24
from ria_vllm.format.pattern import TWO_OF_FOUR, Pattern

SHAPE = "shape"
"""The name of the tensor that repeats [out, in], int64 [2, 1]. It belongs to every linear of every format."""

Parts = Mapping[str, torch.Tensor]


def name_of(dtype: torch.dtype) -> str:
    """The name without torch's prefix, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Part:
    """One stored tensor of a linear [out, in].

    Attributes:
        name: the last part of its name in the checkpoint.
        dtypes: the dtypes that it may have.
        channels: input channels per column; None: the tensor is [out, 1], one number per row.
        fill: the value of padding columns.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    channels: int | None
    fill: int = 0

    def shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """That of the tensor; `in_features` is a multiple of `channels`."""
        return out_features, 1 if self.channels is None else in_features // self.channels


BITMASK = Part("bitmask", (torch.uint8,), 8, fill=0b00110011)
ROW_SCALE = Part("weight_scale", (torch.float32,), None)


class WeightFormat(ABC):
    """How the kept values of a pruned linear are stored. Formats hold no state: those of one class and name are equal.

    Attributes:
        name: what kernels call it.
        parts: the stored tensors. `compressed` (the values) and `bitmask` must be among them; scales must be called
            `weight_scale`.
        quantization: how config.json describes the values, in compressed-tensors' words; None for plain floating point.
    """

    name: str
    parts: tuple[Part, ...]
    quantization: Mapping[str, Any] | None = None

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.name == getattr(other, "name", None)

    def __hash__(self) -> int:
        return hash((type(self), self.name))

    def __repr__(self) -> str:
        return f"<{self.name}>"

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The last parts of the stored tensors' names."""
        return (*(part.name for part in self.parts), SHAPE)

    @property
    def column_multiple(self) -> int:
        """A tensor-parallel cut may fall between columns at multiples of this."""
        return lcm(*(part.channels for part in self.parts if part.channels))

    @property
    def group_size(self) -> int | None:
        """Stored columns that share a scale; None if scales are per row. Quantizing groups needs the stored order."""
        return next((part.channels for part in self.parts if part.name == "weight_scale"), None)

    def bits_per_weight(self, dtype: torch.dtype) -> float:
        """Bits for each weight of the dense matrix, of a model in `dtype`. One scale per row is not counted."""
        return sum(8 * self.written_dtype(part, dtype).itemsize / part.channels for part in self.parts if part.channels)

    def written_dtype(self, part: Part, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a part as `encode` gives it, of a model in `dtype`."""
        return dtype if dtype in part.dtypes else part.dtypes[0]

    @abstractmethod
    def quantize(
        self, weight: torch.Tensor, dtype: torch.dtype, scales: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Round a matrix to the nearest one that the format can hold.

        Args:
            weight: [out, in], any floating dtype, columns in the stored order if there is a `group_size`.
            dtype: of the model.
            scales: those to round by, as they are stored; None: those that fit the largest magnitudes.

        Returns:
            The weight as `decode` gives it back, in `dtype`, and its scales, or None.
        """

    def encode(
        self,
        weight: torch.Tensor,
        mask: torch.Tensor | None,
        scales: torch.Tensor | None,
        pattern: Pattern = TWO_OF_FOUR,
    ) -> dict[str, torch.Tensor]:
        """The parts of a matrix that `quantize` returned.

        Args:
            weight: [out, in], columns in the stored order.
            mask: bool [out, in], in the pattern; None: the largest magnitudes.

        Raises:
            ValueError: a wrong shape, or a mask that does not have the pattern.
        """
        return self.encode_kept(*sparse24.compress(weight, mask, pattern), scales)

    @abstractmethod
    def encode_kept(
        self, values: torch.Tensor, bitmask: torch.Tensor, scales: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """The parts of a matrix whose kept values are known. A part may be the same tensor as an argument.

        Args:
            values: [out, in/2], such as `quantize` returned.
            bitmask: uint8 [out, in/8], which has passed `sparse24.check_bitmask`.
        """

    @abstractmethod
    def values(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """The values that `compressed` holds, in `dtype`: the kept ones, [out, in/2].

        A checkpoint of compressed-tensors may store all values of a linear in it, zeros too: then [out, in].
        """

    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """Dense [out, in] in `dtype`, columns in the stored order. The parts must have passed `check`."""
        return sparse24.decompress(self.values(parts, dtype), parts["bitmask"])

    def widen(self, parts: Parts, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The same weight in the format float, in `dtype`, for kernels that cannot multiply this one."""
        return {"compressed": self.values(parts, dtype), "bitmask": parts["bitmask"]}

    def check(self, parts: Parts, shape: tuple[int, int] | None = None, pattern: Pattern = TWO_OF_FOUR) -> str | None:
        """What is wrong with stored tensors, or None. Nothing may read untrusted ones before they have passed.

        Args:
            shape: (out, in), if the checkpoint states it elsewhere.
        """
        for part in self.parts:
            if part.name not in parts:
                return f"{part.name} is missing"
            tensor = parts[part.name]
            if tensor.dtype not in part.dtypes:
                return (
                    f"{part.name} has dtype {name_of(tensor.dtype)}, expected {' or '.join(map(name_of, part.dtypes))}"
                )
        wrong = sparse24.check_bitmask(parts["bitmask"], shape, pattern)
        if wrong:
            return wrong
        rows, columns = parts["bitmask"].shape[0], parts["bitmask"].shape[1] * 8
        if columns % self.column_multiple:
            return f"the matrix has {columns} columns, not a multiple of {self.column_multiple} as in {self.name}"
        for part in self.parts:
            found, wanted = tuple(parts[part.name].shape), part.shape(rows, columns)
            if found != wanted:
                return f"{part.name} has shape {found}, expected {wanted}"
        scale = parts.get("weight_scale")
        if scale is not None and not bool((scale.isfinite() & (scale > 0)).all()):
            return "weight_scale is not positive and finite everywhere"
        return None

    def take_rows(self, parts: Parts, rows: slice | torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows by a slice or by int64 indices: some of them, or all of them permuted."""
        return {part.name: parts[part.name][rows] for part in self.parts}

    def pad_columns(self, parts: Parts, count: int) -> dict[str, torch.Tensor]:
        """`count` more columns, a multiple of `column_multiple`, whose weights are zero."""
        if count % self.column_multiple:
            raise ValueError(f"{count} columns are not a multiple of {self.column_multiple}")
        padded = {}
        for part in self.parts:
            tensor = parts[part.name]
            if part.channels is not None:
                fill = tensor.new_full((len(tensor), count // part.channels), part.fill)
                tensor = torch.cat([tensor, fill], dim=1)
            padded[part.name] = tensor
        return padded
