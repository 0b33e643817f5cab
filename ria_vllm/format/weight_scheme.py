"""How a checkpoint stores a linear: in one of `ria_vllm.format.formats`, or as compressed-tensors does.

vLLM calls this a scheme. It says which tensors there are, and turns them into the parts of a weight format.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Literal

import torch

from ria_vllm.format import sparse24
from ria_vllm.format.formats import FLOAT, FP8, INT8, IntFormat
from ria_vllm.format.int8_rows import INTEGERS
from ria_vllm.format.pattern import TWO_OF_FOUR, Pattern
from ria_vllm.format.schema import RiaSchema
from ria_vllm.format.weight_format import Part, WeightFormat, name_of


@dataclass(frozen=True)
class TensorSpec:
    """One of the tensors that store a linear [out, in].

    Attributes:
        part: the tensor in the checkpoint.
        dtype: of the parameter that the tensor is loaded into.
        per_tensor: the tensor is one number for the whole linear; it has neither rows nor columns.
    """

    part: Part
    dtype: torch.dtype
    per_tensor: bool = False

    @property
    def dtypes(self) -> str:
        """Those that the tensor may have, for errors."""
        return " or ".join(map(str, self.part.dtypes))

    def shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        return (1,) if self.per_tensor else self.part.shape(out_features, in_features)


@dataclass(frozen=True)
class Weights:
    """The pruned weights of a layer on this rank.

    Attributes:
        format: what the parts mean.
        parts: tensor by the name of the part.
        padding: how many input channels at the end are zeros that the checkpoint does not store.
        widened_from: the format that the checkpoint stores, if these are its values in plain floating point.
        pattern: of the bitmask.
    """

    format: WeightFormat
    parts: dict[str, torch.Tensor]
    padding: int = 0
    widened_from: WeightFormat | None = None
    pattern: Pattern = TWO_OF_FOUR

    @property
    def out_features(self) -> int:
        return self.parts["bitmask"].shape[0]

    @property
    def in_features(self) -> int:
        """With the padding."""
        return self.parts["bitmask"].shape[1] * 8

    @property
    def device(self) -> torch.device:
        return self.parts["bitmask"].device

    def rows(self, start: int, count: int) -> "Weights":
        return replace(self, parts=self.format.take_rows(self.parts, slice(start, start + count)))

    def widened(self, dtype: torch.dtype) -> "Weights":
        """The same in plain floating point."""
        if self.format == FLOAT:
            return self
        return replace(self, format=FLOAT, parts=self.format.widen(self.parts, dtype), widened_from=self.format)

    def padded(self) -> "Weights":
        """With zero channels appended, up to the multiple that kernels require."""
        padding = -self.in_features % sparse24.IN_FEATURES_MULTIPLE
        return replace(self, parts=self.format.pad_columns(self.parts, padding), padding=padding) if padding else self


@dataclass(frozen=True)
class WeightScheme:
    """How one linear is stored.

    Attributes:
        format: of the values.
        dense: the values are a plain `weight` [out, in] with zeros, instead of `compressed` and `bitmask`. Those of
            four bits are two to a byte, as in `compressed`.
        strategy: for a format with one scale per row: "channel" if the checkpoint stores them so, "tensor" if it stores
            one for the whole linear.
        activations: dtype to which the checkpoint wants the linear's input rounded; None for no rounding.
        scale_dtype: of scales of groups in the checkpoint; float32, which holds the others, if only its tensors tell.
        pattern: of each row; 2:4 in the checkpoints of others.
        plain: the name of the tensor with the values if they are `dense`. As `integers`, they are served dense.
    """

    format: WeightFormat = FLOAT
    dense: bool = False
    strategy: Literal["tensor", "channel"] = "channel"
    activations: torch.dtype | None = None
    scale_dtype: torch.dtype = torch.float32
    pattern: Pattern = TWO_OF_FOUR
    plain: str = "weight"

    def __str__(self) -> str:
        values = f"{self.format.name} weights{' with their zeros' if self.dense else ''}"
        if not self.quantized:
            return values
        per = self.strategy if self.format.group_size is None else "group"
        inputs = "unrounded" if self.activations is None else name_of(self.activations)
        return f"{values} (a scale per {per}) and {inputs} inputs"

    @classmethod
    def of(cls, schema: RiaSchema) -> "WeightScheme":
        """That of all pruned linears of a checkpoint of ours."""
        return cls(schema.weight_format, activations=schema.input_dtype, pattern=schema.pattern)

    @classmethod
    def of_dense(cls, schema: RiaSchema) -> "WeightScheme":
        """That of `RiaSchema.int8_linears`."""
        return cls(INT8, dense=True, activations=schema.input_dtype, plain=INTEGERS)

    @property
    def column_multiple(self) -> int:
        """A tensor-parallel cut may fall between columns at multiples of this."""
        return lcm(self.format.column_multiple, self.pattern.of)

    @property
    def quantized(self) -> bool:
        return self.format.quantization is not None

    @property
    def keeps_format(self) -> bool:
        """Whether a kernel may multiply the values as they are.

        Kernels multiply fp8 weights with inputs rounded to fp8, so fp8 weights are served as floating point if the
        checkpoint wants its inputs unrounded. With integers they do as they are told, see `input_dtype`.
        """
        return self.format != FP8 or self.activations == torch.float8_e4m3fn

    @property
    def input_dtype(self) -> torch.dtype | None:
        """What kernels are told as `LinearLayerConfig.input_dtype`."""
        rounded = self.activations == torch.int8 and isinstance(self.format, IntFormat)
        return torch.int8 if rounded else None

    def tensors(self, served: torch.dtype) -> dict[str, TensorSpec]:
        """The tensors of a linear, by the last part of their names; `served` is the dtype of the model in vLLM."""
        found = {}
        for part in self.format.parts:
            dtype = self.format.written_dtype(part, served)
            if part.name == "weight_scale":
                found[part.name] = self._scales(part)
            elif not self.dense:
                found[part.name] = TensorSpec(part, dtype)
            elif part.name == "compressed" and part.channels:
                found[self.plain] = TensorSpec(Part(self.plain, part.dtypes, part.channels // 2), dtype)
        return found

    def _scales(self, part: Part) -> TensorSpec:
        """A parameter holds what is stored without rounding it."""
        if part.channels is None:
            return TensorSpec(replace(part, dtypes=sparse24.VALUE_DTYPES), torch.float32, self.strategy == "tensor")
        dtypes = part.dtypes if self.scale_dtype == torch.float32 else (self.scale_dtype,)
        return TensorSpec(replace(part, dtypes=dtypes), self.scale_dtype)

    def weights(
        self,
        loaded: Mapping[str, torch.Tensor],
        sizes: Sequence[int],
        served: torch.dtype,
        stored_scales: Collection[torch.dtype] = (),
    ) -> Weights | None:
        """The loaded tensors as the parts of a format that a kernel may multiply.

        Args:
            loaded: tensor by the last part of its name, of all linears of a layer together.
            sizes: rows of each output of the layer.
            served: dtype of the model in vLLM.
            stored_scales: the dtypes that the checkpoint's scales have. Scales of groups keep theirs if it is one, so
                that their dtype does not depend on their values.

        Returns:
            None if the linear was stored plain and is not 2:4, or is not to be, see `dense_weight`.

        Raises:
            ValueError: a scale that is not finite, or a bitmask without the pattern. Most kernels take scales of zero
                or less as others: a value is multiplied by them.
        """
        parts = {name: tensor for name, tensor in loaded.items() if name != "weight"}
        if "weight_scale" in loaded:
            if self.format.group_size is None:
                parts["weight_scale"] = row_scales(loaded["weight_scale"], sizes)
            if not bool(parts["weight_scale"].isfinite().all()):
                raise ValueError("a weight_scale is not a finite number")
            if self.format.group_size is not None and self.scale_dtype == torch.float32:
                dtypes = set(stored_scales)
                parts["weight_scale"] = parts["weight_scale"].to(*(dtypes if len(dtypes) == 1 else ()))
        if self.plain == INTEGERS:
            return None
        if self.dense:
            values = loaded["weight"]
            if isinstance(self.format, IntFormat):
                values = self.format.integers({"compressed": values})
            found = sparse24.compress_pruned(values)
            if found is None:
                return None
            compressed, parts["bitmask"] = found
            parts["compressed"] = self.format.pack(compressed) if isinstance(self.format, IntFormat) else compressed
        weights = Weights(self.format, parts, pattern=self.pattern)
        weights = (weights if self.keeps_format else weights.widened(served)).padded()
        if fault := sparse24.check_bitmask(weights.parts["bitmask"], pattern=self.pattern):
            raise ValueError(fault)
        return weights

    def dense_weight(
        self, loaded: Mapping[str, torch.Tensor], sizes: Sequence[int], served: torch.dtype
    ) -> torch.Tensor:
        """[out, in] in the dtype `served`, of a linear that was stored plain."""
        parts = {"compressed": loaded[self.plain]}
        if "weight_scale" in loaded:
            parts["weight_scale"] = row_scales(loaded["weight_scale"], sizes)
        return self.format.values(parts, served)


def misfit(scheme: WeightScheme, columns: int) -> str | None:
    """Why a linear with `columns` input channels cannot be stored so, with the way out; or None."""
    multiple = scheme.column_multiple
    if columns % multiple == 0:
        return None
    return (
        f"{columns} input channels are not a multiple of {multiple}, which {scheme.format.name} in {scheme.pattern} "
        "needs. config.json and the weights do not belong together; get both again."
    )


def uneven_cut(scheme: WeightScheme, columns: int, ranks: int) -> str | None:
    """Why a rank cannot have its part of the input of a linear that fits as a whole, with the way out; or None."""
    multiple, here = scheme.column_multiple, columns // ranks
    if here % multiple == 0:
        return None
    left = f"{columns} input channels over {ranks} ranks leave {here} each, which is not a multiple of {multiple}"
    if scheme.format.group_size is None:
        return f"{left}. Use a smaller --tensor-parallel-size."
    return (
        f"{left}: a group of {scheme.format.group_size} channels has one scale ({scheme.format.name}). Use a smaller "
        "--tensor-parallel-size, or a checkpoint with smaller groups (`ria-vllm compress --group-size`)."
    )


def row_scales(scale: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """float32 [out, 1] from one number for each of the outputs of `sizes` rows; a matrix of scales stays as it is."""
    if scale.dim() == 1:
        scale = torch.repeat_interleave(scale, torch.tensor(sizes, device=scale.device))[:, None]
    return scale.float()
