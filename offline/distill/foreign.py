"""Another program's 2:4 folder to start from: dense weights with zeros, or compressed-tensors' sparse-24-bitmask."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ria_vllm.checkpoint.sparse_linear import SparseLinear
from ria_vllm.compressed_tensors.config import quantization_of, quantization_places
from ria_vllm.compressed_tensors.packed_forms import UNMISTAKABLE
from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json
from ria_vllm.files.open_files import OpenFiles
from ria_vllm.format import plain24, sparse24
from ria_vllm.format.formats import FLOAT
from ria_vllm.format.schema import FORMAT, RiaSchema, SparsityConfig
from ria_vllm.format.weight_format import SHAPE
from ria_vllm.hub.model_card import ANOTHER_PROGRAM
from ria_vllm.offline.distill.checks import outline
from ria_vllm.offline.distill.start import Start, Tensors
from ria_vllm.offline.model.files.which_weights import meant_weights
from ria_vllm.offline.model.run.architecture import find_decoder
from ria_vllm.offline.model.run.names import Names
from ria_vllm.offline.model.topology import linears_of
from ria_vllm.offline.publish import published
from ria_vllm.vllm_quirks import fused_sets, served_dense

LAYER = re.compile(r"\.\d+\.")
QUANTIZED = ("weight_scale", *UNMISTAKABLE)
PARTS = ("compressed", "bitmask", SHAPE)
MOST_KEPT = 2  # of four weights that follow each other


def foreign_start(folder: Path) -> Start:
    """From a folder of another program. Masks are where the zeros are, or as they are stored; nothing is permuted.

    Only linears of the text decoder's layers count, and where they are stored with their zeros, those that have at most
    two other values in each group of four. All others are written dense.

    Raises:
        RiaError: no linear is 2:4, weights are quantized or stored in a form that is not read here, stacked experts are
            2:4, of linears that vLLM fuses some are and some are not, or tensors' names lack the base model's prefix.
    """
    config: dict[str, Any] = read_json(folder / "config.json")
    _check_form(quantization_of(config), folder)
    described = False
    for place, key in quantization_places(config):
        described |= place.pop(key, None) is not None
    weights = _Weights(folder)
    inside, outside, kept_dense = _linears(weights)
    linears = [name for name in inside if name not in kept_dense and weights.linear(name) is not None]
    pruned = set(linears)
    if not pruned:
        raise RiaError(f"{folder}: no linear of a decoder layer is 2:4. Prune the model first (`ria-vllm compress`).")
    _check_fused(folder, inside, pruned)
    sizes = {name: torch.Size(weights.shape(name)).numel() for name in inside}
    zeros = 0.5 * sum(sizes[name] for name in pruned) / sum(sizes.values())
    recipe = {"method": ANOTHER_PROGRAM, "pattern": "2:4", "permute": "none", "source": published(str(folder))}
    ignore = [name for name in [*outside, *inside] if name not in pruned]
    schema = RiaSchema(sparsity_config=SparsityConfig(ignore=ignore, global_sparsity=round(zeros, 6)), recipe=recipe)
    others = [name for name in weights.names if name.removesuffix(".weight") not in pruned]
    return Start(
        folder=folder,
        linears=linears,
        linear=weights.pruned,
        others=Tensors(others, weights.tensor),
        dense_names=[*(f"{name}.weight" for name in linears), *others],
        config=config | {"quantization_config": schema.model_dump(mode="json", exclude_none=True)},
        schema=schema,
        report={
            "recipe": recipe, "linears": {name: {"shape": list(weights.shape(name))} for name in linears}, "dense": {},
        },
        needs_state=described or bool(weights.stored),
    )  # fmt: skip


def _check_form(quantization: Mapping[str, Any], folder: Path) -> None:
    """Refuse weights in other forms than those of the module's first line, as config.json describes them."""
    sparsity = quantization.get("sparsity_config")
    stored = sparsity.get("format") if isinstance(sparsity, dict) else None
    form = quantization.get("format")
    for key in ("transform_config", "kv_cache_scheme"):
        if quantization.get(key):
            raise _not_read(folder, f"config.json has a {key}")
    if not quantization or (
        quantization.get("quant_method") == "compressed-tensors"
        and not quantization.get("config_groups")
        and stored in ("dense", FORMAT)
        and form in (None, "dense", FORMAT)
    ):
        return
    named = next((one for one in (form, stored, quantization.get("quant_method")) if one), "without a name")
    raise _not_read(folder, f"config.json describes weights in another form ({named})")


def _not_read(folder: Path, what: str) -> RiaError:
    return RiaError(
        f"{folder}: {what}. Distillation takes 2:4 weights of others as plain numbers, with zeros or in {FORMAT}. Give "
        "the model from before it was quantized; or prune the dense model with `ria-vllm compress --scheme W8A8` (or "
        "another), and distil that."
    )


class _Weights:
    """The tensors of a folder, under the names of the dense model.

    Attributes:
        names: all of them. stored: the linears in compressed-tensors' form.
    """

    def __init__(self, folder: Path):
        self.folder, self.files, self._open = folder, meant_weights(folder, str(folder)), OpenFiles()
        for name in self.files:
            if name.rpartition(".")[2] in QUANTIZED:
                raise _not_read(folder, f"{name}: the weight is quantized")
        self.stored = {name.removesuffix(".bitmask") for name in self.files if name.endswith(".bitmask")}
        parts = {f"{linear}.{part}": linear for linear in self.stored for part in PARTS}
        for linear in sorted(self.stored):
            if f"{linear}.weight" in self.files:
                raise RiaError(f"{folder}: {linear} is there as weight and as bitmask. Get the files of one run.")
        self.names = list(dict.fromkeys(f"{parts[name]}.weight" if name in parts else name for name in self.files))
        for name in filter(LAYER.search, self.files):
            self._check_stack(name)

    def shape(self, linear: str) -> tuple[int, ...]:
        """That of a weight as plain numbers."""
        if linear in self.stored:
            found = self._open.shape(self.files[f"{linear}.bitmask"], f"{linear}.bitmask")
            if len(found) != 2:
                raise RiaError(f"{self.folder}: {linear}.bitmask has shape {tuple(found)}. The file is damaged.")
            return found[0], found[1] * 8
        return self._open.shape(self.files[f"{linear}.weight"], f"{linear}.weight")

    def linear(self, name: str) -> SparseLinear | None:
        """A linear with two kept values in each group of four; None if it has more.

        Raises:
            RiaError: it is damaged.
        """
        if name in self.stored:
            parts = {part: self._read(f"{name}.{part}") for part in PARTS}
            shape = parts.pop(SHAPE).flatten().tolist()
            wrong = "its shape has not two numbers" if len(shape) != 2 else FLOAT.check(parts, tuple(shape))
            if wrong:
                raise RiaError(f"{self.folder}: {name}: {wrong}. The file is damaged; get it again.")
            return SparseLinear(name, FLOAT, parts, None, parts["compressed"].dtype)
        weight = self._read(f"{name}.weight")
        if weight.dtype not in sparse24.VALUE_DTYPES or weight.shape[1] % sparse24.IN_FEATURES_MULTIPLE:
            return None
        found = plain24.compress(weight)
        if found is None:
            return None
        return SparseLinear(name, FLOAT, {"compressed": found[0], "bitmask": found[1]}, None, weight.dtype)

    def pruned(self, name: str) -> SparseLinear:
        """One that `linear` finds."""
        found = self.linear(name)
        assert found is not None
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the dense model."""
        linear = name.removesuffix(".weight")
        return self.pruned(linear).dense() if linear in self.stored and linear != name else self._read(name)

    def _read(self, name: str) -> torch.Tensor:
        if name not in self.files:
            raise RiaError(f"{self.folder}: {name} is missing. Get the files again.")
        return self._open.tensor(self.files[name], name)

    def _check_stack(self, name: str) -> None:
        """Refuse pruned experts in a stack, [experts, out, in] or [experts, in, out], as they could not be trained."""
        if len(self._open.shape(self.files[name], name)) != 3:
            return
        if any(_is_pruned(one) or _is_pruned(one.T) for one in self._read(name) if bool(one.any())):
            raise RiaError(
                f"{self.folder}: {name}: another program has pruned these experts, so they cannot be trained. "
                "Distillation takes experts of folders that `ria-vllm compress` wrote: prune the dense model with it, "
                "and distil that."
            )


def _is_pruned(weight: torch.Tensor) -> bool:
    if weight.dtype not in sparse24.VALUE_DTYPES or weight.shape[1] % sparse24.IN_FEATURES_MULTIPLE:
        return False
    return bool(((weight != 0).reshape(len(weight), -1, 4).sum(-1) <= MOST_KEPT).all())


def _linears(weights: _Weights) -> tuple[list[str], list[str], set[str | None]]:
    """The linears in the text decoder's layers; all others, of towers or unknown to transformers' model; and those
    inside that vLLM serves dense only."""
    folder, model = weights.folder, outline(str(weights.folder))
    names, layers = Names(model, weights.names, folder), find_decoder(model, str(folder))[1]
    kept_dense = {
        names.linear(f"{layers}.{index}.{name}")
        for index, layer in enumerate(model.get_submodule(layers))
        for name in served_dense(layer)
    }
    known = {f"{names.linear(path)}.weight" for path in linears_of(model)}
    inside: list[str] = []
    outside: list[str] = []
    for name in weights.names:
        linear = name.removesuffix(".weight")
        if linear == name or not (name in known or LAYER.search(name)) or len(weights.shape(linear)) != 2:
            continue
        written = names.written(name)
        if written in names.unknown or not names.inside.get(written or "", "").startswith(f"{layers}."):
            outside.append(linear)
        elif written == name:
            inside.append(linear)
        else:
            raise RiaError(
                f"{folder}: {name} is {written} in a {type(model).__name__}. Load the folder with "
                "AutoModelForCausalLM.from_pretrained and save it with save_pretrained, which writes such names."
            )
    return inside, outside, kept_dense


def _check_fused(folder: Path, linears: list[str], pruned: set[str]) -> None:
    """Refuse what vLLM could not serve: it fuses some linears into one, which is either 2:4 or dense."""
    for fused in sorted(fused_sets(set(linears), families=True), key=sorted):
        found = sorted(fused.intersection(linears))
        dense = [name for name in found if name not in pruned]
        if dense and len(dense) < len(found):
            raise RiaError(
                f"{folder}: {dense[0]} is dense, but {min(fused & pruned)} is 2:4. vLLM fuses "
                f"{', '.join(found)}, so it could not serve the result. Give a folder in which all of them are 2:4, or "
                "all dense; `ria-vllm compress` writes such folders."
            )
