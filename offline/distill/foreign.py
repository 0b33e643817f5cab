"""Another program's 2:4 checkpoint as something to start from: dense with zeros, or compressed-tensors' bitmasks."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ria_vllm import sparse24
from ria_vllm.checkpoint import SparseLinear, checked_linear, read_json, weight_files
from ria_vllm.errors import RiaError
from ria_vllm.formats import FLOAT
from ria_vllm.model_card import ANOTHER_PROGRAM
from ria_vllm.offline.distill.start import Tensors
from ria_vllm.offline.publish import published
from ria_vllm.open_files import OpenFiles
from ria_vllm.schema import FORMAT, RiaSchema, SparsityConfig

LAYER = re.compile(r"\.\d+\.")


class ForeignStart:
    """See `Start`. Masks are where the zeros are, or as they are stored; nothing is permuted.

    Only linears of decoder layers count, and of a dense folder those that have at most two values other than zero in
    each group of four. All others stay dense.

    Raises:
        RiaError: no linear is 2:4, weights are quantized, or stacked experts are 2:4.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self.files = weight_files(folder)
        self._open = OpenFiles()
        quantization = self.config.pop("quantization_config", None)
        if quantization is not None:
            _check_only_sparse(quantization, folder)
        self.linears = [name.removesuffix(".compressed") for name in self.files if name.endswith(".compressed")]
        if self.linears and quantization is None:
            raise RiaError(f"{folder}: weights are compressed, but config.json does not say how. Get both again.")
        self.stored = bool(self.linears)
        self._check_stacks()
        dense = [n.removesuffix(".weight") for n in self.files if n.endswith(".weight") and LAYER.search(n)]
        dense = [name for name in dense if len(self._shape(f"{name}.weight")) == 2]
        if not self.stored:
            self.linears = [name for name in dense if _is_sparse(self._tensor(f"{name}.weight"))]
        if not self.linears:
            raise RiaError(
                f"{folder}: no linear of a decoder layer is 2:4. Prune the model first (`ria-vllm compress`)."
            )
        own = {f"{name}.{part}" for name in self.linears for part in (*FLOAT.tensor_names, "weight")}
        self.others: Mapping[str, torch.Tensor] = Tensors(
            [name for name in self.files if name not in own], self._tensor
        )
        kept = [name for name in dense if name not in set(self.linears)]
        head = ["lm_head"] if "lm_head.weight" in self.files else []
        sizes = {name: torch.Size(self._linear_shape(name)).numel() for name in self.linears}
        total = sum(sizes.values()) + sum(torch.Size(self._shape(f"{name}.weight")).numel() for name in kept)
        self.schema = RiaSchema(
            sparsity_config=SparsityConfig(
                ignore=head + kept, global_sparsity=round(0.5 * sum(sizes.values()) / total, 6)
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
        if self.stored:
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
        if not self.stored:
            return None
        return {f"{name}.weight": self.linear(name).dense() for name in self.linears} | dict(self.others)

    def report(self) -> dict[str, Any]:
        """What is known of the pruning."""
        linears = {name: {"shape": list(self._linear_shape(name))} for name in self.linears}
        return {"recipe": self.schema.recipe, "linears": linears, "dense": {}}

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
        return self._open.tensor(self.files[name], name)

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name).shape)

    def _linear_shape(self, name: str) -> tuple[int, ...]:
        if not self.stored:
            return self._shape(f"{name}.weight")
        rows, bytes_ = self._shape(f"{name}.bitmask")
        return rows, bytes_ * 8


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
