"""Weights of compressed-tensors' 2:4 models, made plain matrices again, zeros and all; see `dequantize`."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ria_vllm.compressed_tensors.config import CompressedTensorsConfig
from ria_vllm.compressed_tensors.packed_forms import DROPPED, Marlin24, PackedForm, PackQuantized, Translation
from ria_vllm.errors import RiaError
from ria_vllm.format.weight_format import SHAPE
from ria_vllm.format.weight_scheme import WeightScheme
from ria_vllm.offline.model.files.tensors import Header

# What tells that a linear is not stored as a plain weight.
STORED = {"compressed", "bitmask", SHAPE, "weight_scale", *Marlin24.takes, *PackQuantized.takes, *DROPPED}


@dataclass(frozen=True)
class StoredLinear:
    """A linear's weight in the files. values: one of its tensors; parts: all of them; shape: [out, in]."""

    name: str
    values: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CompressedTensors:
    """Linears in sparse-24-bitmask or with their zeros, also in fp8 or int8, in marlin-24 or in pack-quantized.

    Those of such a model that are not 2:4 are read, too.
    """

    config: CompressedTensorsConfig
    method: str = "compressed-tensors"
    ends: ClassVar[tuple[str, ...]] = ()  # `find` leaves none
    of_activations: ClassVar[tuple[str, ...]] = ("input_scale", "output_scale")

    def find(self, headers: Mapping[str, Header]) -> dict[str, StoredLinear]:
        """Name of a weight -> its tensors.

        Raises:
            RiaError: a linear has other tensors than config.json says.
        """
        linears: dict[str, list[str]] = defaultdict(list)
        for name in headers:
            linear, _, part = name.rpartition(".")
            if part in STORED:
                linears[linear].append(name)
        return {f"{linear}.weight": self._stored(linear, names, headers) for linear, names in linears.items()}

    def dequantized(self, one: StoredLinear, read: Callable[[str], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The plain weight [out, in] in `dtype`.

        Raises:
            RiaError: a tensor is damaged, or means something that is not read here, such as zero points.
        """
        translated = self._translation.translate([(name, read(name)) for name in one.parts])
        loaded = {name.rpartition(".")[2]: tensor for name, tensor in translated}
        loaded.pop(SHAPE, None)
        rows, columns = one.shape
        scheme = self._scheme(one.name, loaded)
        try:
            for name, spec in scheme.tensors(dtype).items():
                tensor, shape = loaded[name], spec.shape(rows, columns)
                if spec.per_tensor and tensor.numel() == 1:
                    tensor = loaded[name] = tensor.view(1)
                if tensor.dtype not in spec.part.dtypes or tensor.shape != shape:
                    raise ValueError(f"{name} is {tensor.dtype} {[*tensor.shape]}, expected {spec.dtypes} {[*shape]}")
            scale = loaded.get("weight_scale", torch.zeros(1))
            if not bool(scale.isfinite().all()):
                raise ValueError("a weight_scale is not a finite number")
            if scheme.dense:
                return scheme.dense_weight(loaded, [rows], dtype)
            weights = scheme.weights(loaded, [rows], dtype, stored_scales=[scale.dtype])
            assert weights is not None  # only plain ones may not be 2:4
            return weights.format.decode(weights.parts, dtype)[:, :columns].contiguous()
        except ValueError as error:
            raise RiaError(f"{one.name}: {error}. The weight file is damaged; get it again.") from None

    @property
    def _translation(self) -> Translation:
        return Translation(self.config.form, self.config.weight_format)

    def _scheme(self, linear: str, parts: Iterable[str]) -> WeightScheme:
        """How the linear's values are stored, once they are unpacked and have these parts.

        Raises:
            RiaError: config.json says that it has others.
        """
        there = {*parts} - {SHAPE}
        scheme = replace(self.config.scheme(linear), dense="bitmask" not in there)
        wanted = scheme.tensors(torch.float32).keys()
        if wanted != there:
            raise RiaError(
                f"{linear}: {', '.join(sorted(there))} are in the files; by quantization_config in config.json, it "
                f"should be {', '.join(sorted(wanted))}. Get the model again."
            )
        return scheme

    def _stored(self, linear: str, names: list[str], headers: Mapping[str, Header]) -> StoredLinear:
        if f"{linear}.weight" in headers:
            names = [*names, f"{linear}.weight"]
        self._scheme(linear, [name.rpartition(".")[2] for name in self._translation.names(names)])
        form = self.config.form(linear)
        values = f"{linear}.{_values(form, f'{linear}.bitmask' in headers)}"
        if len(headers[values].shape) != 2:
            raise RiaError(f"{headers[values].file}: {values} is not a matrix. Get the model again.")
        rows, columns = headers[values].shape
        shape = rows, columns
        if isinstance(form, Marlin24):
            shape = columns // 2, rows * 32
        elif isinstance(form, PackQuantized):
            shape = rows, columns * 32 // form.format.num_bits
        elif values.endswith(".bitmask"):
            shape = rows, columns * 8
        return StoredLinear(linear, values, tuple(names), shape)


def _values(form: PackedForm | None, has_bitmask: bool) -> str:
    """The tensor that tells the shape of a linear: see `StoredLinear.values`."""
    if form is not None:
        return "meta" if isinstance(form, Marlin24) else "weight_packed"
    return "bitmask" if has_bitmask else "weight"
