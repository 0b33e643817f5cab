"""2:4 checkpoints of compressed-tensors, which vLLM itself no longer serves."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ria_vllm.errors import RiaError
from ria_vllm.serve.storage import QUANTIZED_DTYPES, Storage

SPARSE_FORMATS = ("sparse-24-bitmask", "dense")
WEIGHT_FORMATS = (None, "dense", "sparse-24-bitmask", "int-quantized", "float-quantized", "naive-quantized")


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is a compressed-tensors one with 2:4 weights in a form known here."""
    sparsity = config.get("sparsity_config")
    return (
        config.get("quant_method") == "compressed-tensors"
        and isinstance(sparsity, Mapping)
        and bool(sparsity.get("targets"))
        and sparsity.get("sparsity_structure") == "2:4"
        and sparsity.get("format") in SPARSE_FORMATS
        and config.get("format") in WEIGHT_FORMATS
    )


@dataclass(frozen=True)
class Selection:
    """Linears chosen by `targets` ("Linear", a name, or re:REGEX), less those of `ignore`."""

    targets: tuple[str, ...]
    ignore: tuple[str, ...]

    def __contains__(self, name: str) -> bool:
        return any(_matches(t, name) for t in self.targets) and not any(_matches(t, name) for t in self.ignore)

    def by_name(self, name: str) -> bool:
        return any(_matches(t, name) for t in self.targets if t != "Linear")

    def renamed(self, mapper: Any) -> "Selection":
        return Selection(*(tuple(_renamed(entry, mapper) for entry in part) for part in (self.targets, self.ignore)))


def _matches(entry: str, name: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return entry in ("Linear", name)


def _renamed(entry: str, mapper: Any) -> str:
    return entry if entry.startswith("re:") or "." not in entry else mapper.apply_list([entry])[0]


@dataclass(frozen=True)
class Foreign:
    """Which linears of such a checkpoint are pruned, and how their values are stored."""

    pruned: Selection
    dense: bool
    groups: tuple[tuple[Selection, Storage], ...] = field(default=())

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> "Foreign":
        """Raises RiaError for a quantization that is not served here."""
        sparsity = config["sparsity_config"]
        dense = sparsity["format"] == "dense"
        ignore = tuple(config.get("ignore") or ())
        groups = [
            (Selection(tuple(group.get("targets") or ()), ignore), _storage(name, group, dense))
            for name, group in (config.get("config_groups") or {}).items()
            if group.get("weights")
        ]
        return cls(Selection(tuple(sparsity["targets"]), tuple(sparsity.get("ignore") or ())), dense, tuple(groups))

    def storage(self, name: str) -> Storage:
        """A group that names the linear goes before one that takes all of them."""
        found = [(storage, selection.by_name(name)) for selection, storage in self.groups if name in selection]
        return next((s for s, by_name in found if by_name), found[0][0] if found else Storage(self.dense))

    def renamed(self, mapper: Any) -> "Foreign":
        groups = tuple((selection.renamed(mapper), storage) for selection, storage in self.groups)
        return Foreign(self.pruned.renamed(mapper), self.dense, groups)


def _storage(name: str, group: Mapping[str, Any], dense: bool) -> Storage:
    weights, inputs = (group.get(key) or {} for key in ("weights", "input_activations"))
    dtype = _dtype(weights)
    strategy = weights.get("strategy")
    if dtype is None or strategy not in ("tensor", "channel") or not weights.get("symmetric", True):
        raise RiaError(
            f"quantization_config.config_groups.{name}: 2:4 weights of {weights.get('num_bits')}-bit "
            f"{weights.get('type')} by {strategy} are not served; symmetric int8 and fp8, by tensor or by channel, are."
        )
    return Storage(dense, dtype, strategy, _dtype(inputs))


def _dtype(quantization: Mapping[str, Any]) -> torch.dtype | None:
    return QUANTIZED_DTYPES.get((quantization.get("type"), quantization.get("num_bits")))
