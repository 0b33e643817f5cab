"""The linears of another program's folder: plain, with bitmasks, or quantized, as compressed-tensors stores them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ria_vllm import fp8, sparse24
from ria_vllm.compressed_tensors.config import CompressedTensorsConfig, is_24_checkpoint
from ria_vllm.compressed_tensors.packed_forms import DROPPED, UNMISTAKABLE, Translation
from ria_vllm.errors import RiaError
from ria_vllm.formats import FP8
from ria_vllm.offline.model.dequantize import OF_ACTIVATIONS, OF_KV_CACHE
from ria_vllm.schema import FORMAT
from ria_vllm.sparse_linear import SparseLinear
from ria_vllm.weight_format import SHAPE, name_of
from ria_vllm.weight_scheme import Weights, WeightScheme, misfit

# The last parts of the names of tensors by which a weight is known to be stored otherwise than as NAME.weight.
STORED = frozenset(("compressed", "weight_scale", *UNMISTAKABLE))
# Those that say how inputs were rounded: here, each token has a scale of its own.
OF_INPUTS = frozenset((*OF_ACTIVATIONS, "input_zero_point", "output_zero_point"))
# All others that such a linear may have, and a dense one has not.
BESIDE = frozenset(("weight", "bitmask", SHAPE, "meta", *DROPPED)) | OF_INPUTS


class ForeignLinears:
    """The linears of a folder, however they are stored.

    Args:
        files: tensor name -> file.
        quantization: `quantization_config` in config.json; None: there is none.
        dtype: of the model, as config.json says; None if it does not.
        read: a tensor by its name, from a file: nothing in it is trusted.
        shape_of: its shape.

    Attributes:
        stored: those that are not just a tensor NAME.weight.

    Raises:
        RiaError: config.json describes weights that are not read here, or does not say how they are stored.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, Path],
        quantization: Any,
        dtype: torch.dtype | None,
        read: Callable[[str], torch.Tensor],
        shape_of: Callable[[str], tuple[int, ...]],
    ):
        self.folder, self.read, self.shape_of, self.dtype = folder, read, shape_of, dtype
        self.config = None if quantization is None else _parsed(quantization, folder)
        self._has_cache_scales = self.config is not None and bool(quantization.get("kv_cache_scheme"))
        self._shapes: dict[str, tuple[int, int]] = {}
        self._parts: dict[str, list[str]] = {}
        for tensor in files:
            module, _, part = tensor.rpartition(".")
            self._parts.setdefault(module, []).append(part)
        self.stored = {name for name, parts in self._parts.items() if not STORED.isdisjoint(parts)}
        for name in self.stored:
            if self.config is None or not ("compressed" in self._parts[name] or self._scheme(name).quantized):
                raise RiaError(
                    f"{folder}: {name}: its weight is compressed or quantized, but config.json does not say how. Get "
                    "both again."
                )

    def dense_tensors(self) -> Iterator[str]:
        """The names of the dense model's tensors. It has none that scale activations or a KV cache."""
        for module, parts in self._parts.items():
            names = parts
            if module in self.stored:
                names = ["weight", *(part for part in parts if part not in STORED | BESIDE)]
            for name in (f"{module}.{part}" if module else part for part in names):
                if not (self._has_cache_scales and OF_KV_CACHE.fullmatch(name)):
                    yield name

    def shape(self, name: str) -> tuple[int, ...]:
        """That of the plain weight."""
        if name in self.stored:
            if name not in self._shapes:
                self._shapes[name] = self._shape(name, self._scheme(name), self._loaded(name))
            return self._shapes[name]
        return self.shape_of(f"{name}.weight")

    def input_dtype(self, name: str) -> torch.dtype | None:
        """The dtype to which a linear rounds each token of its input; None: it does not."""
        scheme = self._scheme(name)
        if scheme.format == FP8:
            return scheme.activations if scheme.activations == fp8.DTYPE else None
        return scheme.input_dtype

    def should_round_inputs(self, name: str) -> bool:
        """Whether config.json asks for rounded inputs of a linear, in whatever way."""
        return self.config is not None and name in self.stored and self.config.rounds_inputs(name)

    def linear(self, name: str) -> SparseLinear | None:
        """A linear with two kept values in each group of four; None if it cannot be stored so.

        Where fewer than two of a group are not zero, a bitmask says which zeros are kept, or else it is the leftmost.

        Raises:
            RiaError: a tensor is damaged or missing, or is another than config.json says; or a scale is not positive.
        """
        found, (rows, columns), dtype = self._found(name)
        if not isinstance(found, Weights) or found.padding:
            return None
        if bool((found.parts.get("weight_scale", torch.ones(1)) <= 0).any()):
            raise RiaError(
                f"{self.folder}: {name}: a weight_scale is zero or less, which is served but cannot be trained. "
                "Quantize the model again, or give it from before it was quantized."
            )
        if wrong := found.format.check(found.parts, (rows, columns)):
            raise self._damaged(name, wrong)
        return SparseLinear(name, found.format, found.parts, None, dtype)

    def plain(self, name: str) -> torch.Tensor:
        """The weight of a linear, [out, in], as plain numbers.

        Raises:
            RiaError: as `linear`, but scales may be any finite numbers.
        """
        found, (_, columns), dtype = self._found(name)
        return found.format.decode(found.parts, dtype)[:, :columns] if isinstance(found, Weights) else found

    def _found(self, name: str) -> tuple[Weights | torch.Tensor, tuple[int, int], torch.dtype]:
        """A linear with its kept values, padded as kernels want it, or its plain weight; its shape; and its dtype."""
        scheme, loaded = self._scheme(name), self._loaded(name)
        if name not in self.stored and loaded["weight"].dtype == torch.float64:
            weight = loaded["weight"]
            return weight, (weight.shape[0], weight.shape[1]), weight.dtype
        rows, columns = self._shape(name, scheme, loaded)
        dtype, found = self._dtype(name, scheme, loaded), None
        if columns % sparse24.IN_FEATURES_MULTIPLE == 0 or not scheme.dense:
            scales = {tensor.dtype for part, tensor in loaded.items() if part == "weight_scale"}
            try:
                # With inputs that are not rounded, vLLM would be given fp8 weights as plain numbers.
                asked = replace(scheme, activations=fp8.DTYPE) if scheme.format == FP8 else scheme
                found = asked.weights(loaded, [rows], dtype, stored_scales=scales)
            except ValueError as error:
                raise self._damaged(name, str(error)) from None
        weight = scheme.dense_weight(loaded, [rows], dtype) if found is None else found
        return weight, (rows, columns), dtype

    def _scheme(self, name: str) -> WeightScheme:
        if self.config is None or name not in self.stored:
            return WeightScheme(dense=True)
        form, scheme = self.config.form(name), self.config.scheme(name)
        compressed = "compressed" in self._parts[name] or (form is not None and "compressed" in form.gives)
        return replace(scheme, dense=not compressed)

    def _loaded(self, name: str) -> dict[str, torch.Tensor]:
        """Its tensors by the last part of their names, unpacked."""
        if name not in self.stored:
            return {"weight": self.read(f"{name}.weight")}
        assert self.config is not None
        translation = Translation(self.config.form, self.config.weight_format)
        parts = [part for part in self._parts[name] if part in STORED | BESIDE and part not in OF_INPUTS]
        try:
            tensors = ((f"{name}.{part}", self.read(f"{name}.{part}")) for part in parts)
            unpacked = dict(translation.translate(tensors, whole=True))
        except RiaError as error:
            raise RiaError(f"{self.folder}: {error}") from None
        return {tensor.removeprefix(f"{name}."): one for tensor, one in unpacked.items()}

    def _shape(self, name: str, scheme: WeightScheme, loaded: dict[str, torch.Tensor]) -> tuple[int, int]:
        """(out, in), once the linear is known to have the tensors of its scheme, and no others."""
        specs = scheme.tensors(torch.float32)
        shape = loaded.pop(SHAPE, None)
        for part, spec in specs.items():
            if part not in loaded:
                raise RiaError(f"{self.folder}: {name}.{part} is in none of the weight files. Get them again.")
            if loaded[part].dtype not in spec.part.dtypes:
                raise self._damaged(
                    name, f"{part} is {name_of(loaded[part].dtype)}, and should be {spec.dtypes} by config.json"
                )
        other = next((part for part in loaded if part not in specs), None)
        values = "weight" if scheme.dense else "bitmask"
        channels = specs[values].part.channels
        if other is not None or loaded[values].dim() != 2:
            raise self._damaged(name, f"{other or values} is not what config.json describes")
        rows, columns = len(loaded[values]), loaded[values].shape[1] * (channels or 1)
        if shape is not None and shape.flatten().tolist() != [rows, columns]:
            raise self._damaged(name, f"{SHAPE} says {shape.flatten().tolist()}, the values {[rows, columns]}")
        if scheme.quantized and (wrong := misfit(scheme.format, columns)):
            raise RiaError(f"{self.folder}: {name}: {wrong}")
        for part, spec in specs.items():
            found, wanted = tuple(loaded[part].shape), spec.shape(rows, columns)
            if found != wanted and not (spec.per_tensor and loaded[part].numel() == 1):
                raise self._damaged(name, f"{part} has shape {found}, expected {wanted}")
            loaded[part] = loaded[part].reshape(wanted)
        return rows, columns

    def _dtype(self, name: str, scheme: WeightScheme, loaded: Mapping[str, torch.Tensor]) -> torch.dtype:
        """That of the linear's plain weight."""
        if not scheme.quantized:
            return loaded["weight" if scheme.dense else "compressed"].dtype
        if self.dtype is None:
            raise RiaError(
                f"{self.folder}/config.json: says nothing of the dtype of the model, and {name} is quantized. Add "
                '"dtype": "bfloat16", or that of the model before it was quantized.'
            )
        if self.dtype not in sparse24.VALUE_DTYPES:
            raise RiaError(
                f"{self.folder}/config.json: the dtype is {name_of(self.dtype)}, but {name} is quantized, and stands "
                f"for numbers in {' or '.join(map(name_of, sparse24.VALUE_DTYPES))}. Give one of these as dtype."
            )
        return self.dtype

    def _damaged(self, name: str, wrong: str) -> RiaError:
        return RiaError(
            f"{self.folder}: {name}: {wrong}. The file is damaged, or config.json is another model's; get both again."
        )


def _parsed(quantization: Any, folder: Path) -> CompressedTensorsConfig | None:
    """What config.json says of 2:4 weights of compressed-tensors; None if it says that they are plain, with zeros.

    Raises:
        RiaError: of others.
    """
    found = quantization if isinstance(quantization, dict) else {}
    sparsity, groups = found.get("sparsity_config"), found.get("config_groups")
    stored = sparsity.get("format") if isinstance(sparsity, dict) else None
    if found.get("quant_method") == "compressed-tensors":
        if is_24_checkpoint(found):
            try:
                # The scales of a KV cache are left out, whatever they are.
                return CompressedTensorsConfig.parse({**found, "kv_cache_scheme": None})
            except RiaError as error:
                raise RiaError(f"{folder}: {error}") from None
        if stored == "dense" and found.get("format") in (None, "dense") and not groups:
            return None
    of_groups = groups.values() if isinstance(groups, dict) else []
    forms = [entry.get("format") for entry in (found, *of_groups) if isinstance(entry, dict)]
    named = [*([] if stored in (FORMAT, "dense") else [stored]), *forms, found.get("quant_method")]
    form = next((one for one in named if one and one != "dense"), "without a name")
    raise RiaError(
        f"{folder}: config.json describes weights in a form that is not read here, or not as 2:4 ({form}). "
        f"Distillation takes 2:4 weights of others if they are plain, with zeros, in {FORMAT}, or quantized in a form "
        "of compressed-tensors that vLLM serves with ria-vllm. Give the model from before it was quantized. Or prune "
        "the dense model with `ria-vllm compress --weights int8` (or int4), and distil that."
    )
