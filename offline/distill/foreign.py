"""Another program's 2:4 checkpoint as something to start from: dense with zeros, or compressed-tensors' bitmasks."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ria_vllm import sparse24
from ria_vllm.errors import RiaError
from ria_vllm.formats import FLOAT
from ria_vllm.json_file import read_json
from ria_vllm.model_card import ANOTHER_PROGRAM
from ria_vllm.offline.distill.outline import outline
from ria_vllm.offline.distill.start import Tensors
from ria_vllm.offline.model.architecture import find_decoder
from ria_vllm.offline.model.names import Names
from ria_vllm.offline.model.topology import linears_of
from ria_vllm.offline.model.which_weights import meant_weights
from ria_vllm.offline.publish import published
from ria_vllm.open_files import OpenFiles
from ria_vllm.schema import FORMAT, RiaSchema, SparsityConfig
from ria_vllm.sparse_linear import SparseLinear, checked_linear
from ria_vllm.vllm_quirks import fused_sets

LAYER = re.compile(r"\.\d+\.")


class ForeignStart:
    """See `Start`. Masks are where the zeros are, or as they are stored; nothing is permuted.

    Only linears of the text decoder's layers count, and of a dense folder those that have at most two values other than
    zero in each group of four. All others are written as dense ones with the same values.

    Raises:
        RiaError: no linear is 2:4, weights are quantized, stacked experts are 2:4, of linears that vLLM fuses some are
            and some are not, or tensors' names lack the base model's prefix.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self.files = meant_weights(folder, str(folder))
        self._open = OpenFiles()
        quantization = self.config.pop("quantization_config", None)
        if quantization is not None:
            _check_only_sparse(quantization, folder)
        compressed = [name for name in self.files if name.endswith(".compressed")]
        self._stored = dict.fromkeys(name.removesuffix(".compressed") for name in compressed)
        if self._stored and quantization is None:
            raise RiaError(f"{folder}: weights are compressed, but config.json does not say how. Get both again.")
        self._check_stacks()
        inside, outside = self._linears()
        self.linears = [name for name in inside if self._is_pruned(name)]
        if not self.linears:
            raise RiaError(
                f"{folder}: no linear of a decoder layer is 2:4. Prune the model first (`ria-vllm compress`)."
            )
        self._check_fused(inside)
        pruned = set(self.linears)
        self.others: Mapping[str, torch.Tensor] = Tensors(
            [name for name in self._dense_tensors() if name.removesuffix(".weight") not in pruned], self._other
        )
        sizes = {name: torch.Size(self._linear_shape(name)).numel() for name in inside}
        zeros = 0.5 * sum(sizes[name] for name in pruned) / sum(sizes.values())
        self.schema = RiaSchema(
            sparsity_config=SparsityConfig(
                ignore=[name for name in [*outside, *inside] if name not in pruned], global_sparsity=round(zeros, 6)
            ),
            recipe={
                "method": ANOTHER_PROGRAM,
                "pattern": "2:4",
                "permute": "none",
                "source": published(str(folder)),
            },
        )
        self.config["quantization_config"] = self.schema.model_dump(mode="json", exclude_none=True)

    def linear(self, name: str) -> SparseLinear:
        """One pruned linear, checked."""
        if name in self._stored:
            parts = {part: f"{name}.{part}" for part in FLOAT.tensor_names}
            found = {part: self._tensor(key) for part, key in parts.items() if key in self.files}
            return checked_linear(name, found, None, self.schema, self.folder)
        weight = self._tensor(f"{name}.weight")
        return SparseLinear(name, FLOAT, FLOAT.encode(weight, None, None), None, weight.dtype)

    def dense_names(self) -> list[str]:
        """The names of the dense model's tensors."""
        return [*(f"{name}.weight" for name in self.linears), *self.others]

    def state(self) -> dict[str, torch.Tensor] | None:
        """All tensors of the dense model, if transformers cannot read the folder by itself."""
        if not self._stored:
            return None
        return {f"{name}.weight": self.linear(name).dense() for name in self.linears} | dict(self.others)

    def report(self) -> dict[str, Any]:
        """What is known of the pruning."""
        linears = {name: {"shape": list(self._linear_shape(name))} for name in self.linears}
        return {"recipe": self.schema.recipe, "linears": linears, "dense": {}}

    def _dense_tensors(self) -> list[str]:
        """The names of all tensors, as if nothing was compressed."""
        parts = {f"{name}.{part}" for name in self._stored for part in FLOAT.tensor_names}
        return [*(name for name in self.files if name not in parts), *(f"{name}.weight" for name in self._stored)]

    def _linears(self) -> tuple[list[str], list[str]]:
        """The linears in the text decoder's layers, and all others: of towers, or unknown to transformers' model."""
        tensors, model = self._dense_tensors(), outline(str(self.folder))
        names, layers = Names(model, tensors, self.folder), find_decoder(model, str(self.folder))[1]
        known = {f"{names.linear(path)}.weight" for path in linears_of(model)}
        inside: list[str] = []
        outside: list[str] = []
        for name in tensors:
            if not name.endswith(".weight") or not (name in known or LAYER.search(name)):
                continue
            linear, written = name.removesuffix(".weight"), names.written(name)
            if len(self._linear_shape(linear)) != 2:
                continue
            in_layer = written not in names.unknown and names.inside.get(written or "", "").startswith(f"{layers}.")
            if in_layer and written != name:
                raise RiaError(
                    f"{self.folder}: {name} is {written} in a {type(model).__name__}. Load the folder with "
                    "AutoModelForCausalLM.from_pretrained and save it with save_pretrained, which writes such names."
                )
            (inside if in_layer else outside).append(linear)
        return inside, outside

    def _is_pruned(self, linear: str) -> bool:
        return linear in self._stored if self._stored else _is_sparse(self._tensor(f"{linear}.weight"))

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
            stack = self._tensor(name)
            if stack.dim() == 3 and any(_is_sparse(one) or _is_sparse(one.T) for one in stack if bool(one.any())):
                raise RiaError(
                    f"{self.folder}: {name}: another program has pruned these experts, so they cannot be trained. "
                    "Distillation takes experts of folders that `ria-vllm compress` wrote: prune the dense model with "
                    "it, and distil that."
                )

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self.files:
            raise RiaError(f"{self.folder}: {name} is missing. Get the files again.")
        return self._open.tensor(self.files[name], name)

    def _other(self, name: str) -> torch.Tensor:
        linear = name.removesuffix(".weight")
        return self.linear(linear).dense() if linear in self._stored else self._tensor(name)

    def _linear_shape(self, name: str) -> tuple[int, ...]:
        if name not in self._stored:
            return tuple(self._tensor(f"{name}.weight").shape)
        shape = tuple(self._tensor(f"{name}.bitmask").shape)
        return *shape[:-1], *(8 * bytes_ for bytes_ in shape[-1:])


def _check_only_sparse(quantization: Any, folder: Path) -> None:
    """Refuse what is quantized, or stored in another way than in `sparse-24-bitmask` or with zeros."""
    found = quantization if isinstance(quantization, dict) else {}
    sparsity = found.get("sparsity_config")
    stored = sparsity.get("format") if isinstance(sparsity, dict) else None
    sparse = stored in (FORMAT, "dense")
    groups = found.get("config_groups")
    if found.get("quant_method") != "compressed-tensors" or not sparse or groups:
        of_groups = groups.values() if isinstance(groups, dict) else []
        forms = [entry.get("format") for entry in (found, *of_groups) if isinstance(entry, dict)]
        named = [*([] if sparse else [stored]), *forms, found.get("quant_method")]
        form = next((one for one in named if one and one != "dense"), "without a name")
        raise RiaError(
            f"{folder}: config.json describes quantized weights, or another form of 2:4 ones ({form}). Distillation "
            f"takes others' 2:4 weights only unquantized, dense with zeros or in {FORMAT}: give the model from before "
            "it was quantized. Or prune the dense model with `ria-vllm compress --weights int8` (or int4), and distil "
            "that."
        )


def _is_sparse(weight: torch.Tensor) -> bool:
    if weight.dtype not in sparse24.VALUE_DTYPES or weight.shape[1] % sparse24.IN_FEATURES_MULTIPLE:
        return False
    return bool(((weight != 0).reshape(len(weight), -1, 4).sum(-1) <= 2).all())
