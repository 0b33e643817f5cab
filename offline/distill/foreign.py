"""Another program's 2:4 checkpoint as something to start from: dense with zeros, or as compressed-tensors stores it."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ria_vllm import fp8, sparse24
from ria_vllm.compressed_tensors.config import quantization_of, quantization_places
from ria_vllm.errors import RiaError
from ria_vllm.json_file import read_json
from ria_vllm.model_card import ANOTHER_PROGRAM
from ria_vllm.offline.distill.foreign_linears import ForeignLinears
from ria_vllm.offline.distill.outline import outline
from ria_vllm.offline.distill.start import Tensors
from ria_vllm.offline.model.architecture import find_decoder
from ria_vllm.offline.model.hf import configured_dtype, read_config
from ria_vllm.offline.model.names import Names
from ria_vllm.offline.model.topology import linears_of
from ria_vllm.offline.model.which_weights import meant_weights
from ria_vllm.offline.publish import published
from ria_vllm.offline.recipe import ROW
from ria_vllm.open_files import OpenFiles
from ria_vllm.schema import TOKENS, RiaSchema, SparsityConfig, WeightQuantization
from ria_vllm.sparse_linear import SparseLinear
from ria_vllm.vllm_quirks import fused_sets, served_dense
from ria_vllm.weight_format import WeightFormat, name_of

LAYER = re.compile(r"\.\d+\.")


class Kind(NamedTuple):
    """What all pruned linears of one of our folders have in common.

    inputs: the dtype to which each token of their input is rounded; None: it is not. dtype: of plain weights.
    """

    format: WeightFormat
    inputs: torch.dtype | None
    dtype: torch.dtype

    def __str__(self) -> str:
        return self.format.name + ("" if self.inputs is None else f" with inputs in {name_of(self.inputs)}")


class ForeignStart:
    """See `Start`. Masks are where the zeros are, or as they are stored; nothing is permuted.

    Only linears of the text decoder's layers count, and where they are stored with their zeros, those that have at most
    two other values in each group of four. All others are written dense, as plain numbers. What scales the inputs of
    quantized linears or a KV cache is left out.

    Raises:
        RiaError: no linear is 2:4, those that are differ in their format, weights are stored in a form that is not read
            here, stacked experts are 2:4, of linears that vLLM fuses some are and some are not, or tensors' names lack
            the base model's prefix.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None] = lambda text: None):
        """`warn`: for what the result will not do as config.json says."""
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self.files = meant_weights(folder, str(folder))
        self._open = OpenFiles()
        quantization = _taken_out(self.config)
        self._described = quantization is not None
        dtype = configured_dtype(read_config(str(folder)))
        self._linears = ForeignLinears(folder, self.files, quantization, dtype, self._tensor, self._shape_of)
        self._check_stacks()
        self._served_dense: set[str | None] = set()
        inside, outside = self._names()
        kinds = {name: one for name in inside if (one := self._kind(name)) is not None}
        if not kinds:
            raise RiaError(
                f"{folder}: no linear of a decoder layer is 2:4. Prune the model first (`ria-vllm compress`)."
            )
        self.linears = list(kinds)
        self._check_alike(kinds)
        self._check_fused(inside)
        self.others: Mapping[str, torch.Tensor] = Tensors(
            [name for name in self._linears.dense_tensors() if name.removesuffix(".weight") not in kinds], self._other
        )
        self.schema = self._schema(kinds, inside, outside)
        self.config["quantization_config"] = self.schema.model_dump(mode="json", exclude_none=True)
        if any(kind.inputs is None and self._linears.should_round_inputs(name) for name, kind in kinds.items()):
            warn(
                f"{folder}: config.json asks for inputs that are rounded in a way that is not served. The result "
                "rounds none, which is more exact."
            )

    def linear(self, name: str) -> SparseLinear:
        """One pruned linear, checked."""
        found = self._linears.linear(name)
        assert found is not None
        return found

    def dense_names(self) -> list[str]:
        """The names of the dense model's tensors."""
        return [*(f"{name}.weight" for name in self.linears), *self.others]

    def state(self) -> dict[str, torch.Tensor] | None:
        """All tensors of the dense model, if transformers cannot read the folder by itself."""
        if not self._described and not self._linears.stored:
            return None
        return {f"{name}.weight": self.linear(name).dense() for name in self.linears} | dict(self.others)

    def report(self) -> dict[str, Any]:
        """What is known of the pruning."""
        linears = {name: {"shape": list(self._linears.shape(name))} for name in self.linears}
        return {"recipe": self.schema.recipe, "linears": linears, "dense": {}}

    def _schema(self, kinds: Mapping[str, Kind], inside: list[str], outside: list[str]) -> RiaSchema:
        form, inputs, dtype = kinds[self.linears[0]]
        sizes = {name: torch.Size(self._linears.shape(name)).numel() for name in inside}
        zeros = 0.5 * sum(sizes[name] for name in kinds) / sum(sizes.values())
        known = {"method": ANOTHER_PROGRAM, "pattern": "2:4", "permute": "none", "source": published(str(self.folder))}
        words = form.quantization
        return RiaSchema(
            sparsity_config=SparsityConfig(
                ignore=[name for name in [*outside, *inside] if name not in kinds], global_sparsity=round(zeros, 6)
            ),
            weights=None if words is None else WeightQuantization(**words, dtype=name_of(dtype)),
            input_activations=None if inputs is None else TOKENS[inputs],
            recipe=known | _said_of(form, inputs),
        )

    def _names(self) -> tuple[list[str], list[str]]:
        """The linears in the text decoder's layers, and all others: of towers, or unknown to transformers' model."""
        tensors, model = list(self._linears.dense_tensors()), outline(str(self.folder))
        names, layers = Names(model, tensors, self.folder), find_decoder(model, str(self.folder))[1]
        for index, layer in enumerate(model.get_submodule(layers)):
            self._served_dense |= {names.linear(f"{layers}.{index}.{name}") for name in served_dense(layer)}
        known = {f"{names.linear(path)}.weight" for path in linears_of(model)}
        inside: list[str] = []
        outside: list[str] = []
        for name in tensors:
            if not name.endswith(".weight") or not (name in known or LAYER.search(name)):
                continue
            linear, written = name.removesuffix(".weight"), names.written(name)
            if len(self._linears.shape(linear)) != 2:
                continue
            in_layer = written not in names.unknown and names.inside.get(written or "", "").startswith(f"{layers}.")
            if in_layer and written != name:
                raise RiaError(
                    f"{self.folder}: {name} is {written} in a {type(model).__name__}. Load the folder with "
                    "AutoModelForCausalLM.from_pretrained and save it with save_pretrained, which writes such names."
                )
            (inside if in_layer else outside).append(linear)
        return inside, outside

    def _kind(self, name: str) -> Kind | None:
        """None: it is dense, or will be, because vLLM serves it in no other way."""
        found = None if name in self._served_dense else self._linears.linear(name)
        if found is None:
            return None
        return Kind(found.format, self._linears.input_dtype(name), found.dtype)

    def _check_alike(self, kinds: Mapping[str, Kind]) -> None:
        """Refuse what a folder of ours could not hold."""
        name, first = next(iter(kinds.items()))
        for other, kind in kinds.items():
            if (kind.format, kind.inputs) != (first.format, first.inputs):
                raise RiaError(
                    f"{self.folder}: {name} is {first}, {other} is {kind}. A folder of ours has one format for all 2:4 "
                    "linears. Give the model from before it was quantized."
                )

    def _check_fused(self, linears: Iterable[str]) -> None:
        """Refuse what vLLM could not serve: it fuses some linears into one, which is either 2:4 or dense."""
        known, pruned = set(linears), set(self.linears)
        for fused in sorted(fused_sets(known, families=True), key=sorted):
            found = sorted(fused & known)
            dense = [name for name in found if name not in pruned]
            if dense and len(dense) < len(found):
                raise RiaError(
                    f"{self.folder}: {dense[0]} is dense, but {min(fused & pruned)} is 2:4. vLLM fuses "
                    f"{', '.join(found)}, so it could not serve the result. Give a folder in which all of them are "
                    "2:4, or all dense; `ria-vllm compress` writes such folders."
                )

    def _check_stacks(self) -> None:
        """Refuse pruned experts in stacks, [experts, out, in] or [experts, in, out], as they could not be trained."""
        for name in filter(LAYER.search, self.files):
            stack = self._tensor(name) if len(self._shape_of(name)) == 3 else ()
            if any(_is_sparse(one) or _is_sparse(one.T) for one in stack if bool(one.any())):
                raise RiaError(
                    f"{self.folder}: {name}: another program has pruned these experts, so they cannot be trained. "
                    "Distillation takes experts of folders that `ria-vllm compress` wrote: prune the dense model with "
                    "it, and distil that."
                )

    def _shape_of(self, name: str) -> tuple[int, ...]:
        return self._open.shape(self.files[name], name)

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self.files:
            raise RiaError(f"{self.folder}: {name} is missing. Get the files again.")
        return self._open.tensor(self.files[name], name)

    def _other(self, name: str) -> torch.Tensor:
        linear = name.removesuffix(".weight")
        if linear == name or linear not in self._linears.stored:
            return self._tensor(name)
        return self._linears.plain(linear)


def _taken_out(config: dict[str, Any]) -> Any:
    """What config.json says of its weights, in any of the places where programs look for it, which are then empty."""
    found: Any = quantization_of(config) or None
    for place, key in quantization_places(config):
        other = place.pop(key, None)
        found = other if found is None else found
    return found


def _said_of(form: WeightFormat, inputs: torch.dtype | None) -> dict[str, Any]:
    """What `compress` would write into the recipe of weights in this format."""
    if form.quantization is None:
        return {}
    found = {"weights": form.name.partition("-")[0], "group_size": form.group_size or ROW}
    return found if inputs is None else found | {"activations": "fp8" if inputs == fp8.DTYPE else name_of(inputs)}


def _is_sparse(weight: torch.Tensor) -> bool:
    if weight.dtype not in sparse24.VALUE_DTYPES or weight.shape[1] % sparse24.IN_FEATURES_MULTIPLE:
        return False
    return bool(((weight != 0).reshape(len(weight), -1, 4).sum(-1) <= 2).all())
