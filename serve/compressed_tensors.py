"""2:4 checkpoints of compressed-tensors, which vLLM itself no longer serves."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.utils import is_match, match_name

from ria_vllm.errors import RiaError
from ria_vllm.formats import FP8, INT8
from ria_vllm.serve.patterns import compile_pattern
from ria_vllm.serve.weight_scheme import WeightScheme
from ria_vllm.weight_format import WeightFormat

WHERE = "config.json: quantization_config"
SPARSE_FORMATS = ("sparse-24-bitmask", "dense")
WEIGHT_FORMATS = (None, "dense", "sparse-24-bitmask", "int-quantized", "float-quantized", "naive-quantized")

# Type and number of bits -> the format of weights, and the dtype of activations, that config.json so describes.
QUANTIZED = {(one.quantization["type"], one.quantization["num_bits"]): one for one in (INT8, FP8)}

LONGEST_NAME = 300
"""Characters of a module's name; a pattern may take long to match a longer one."""

LINEAR = torch.nn.Linear(1, 1, device="meta")
"""compressed-tensors matches targets such as "Linear" by a module's class. Only linears are looked up here."""


def is_24_checkpoint(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is one of compressed-tensors, with 2:4 weights in a form that is served here."""
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
    """Linears that `targets` choose ("Linear", a name, or re:REGEX) and `ignore` does not.

    The patterns come from the checkpoint; `_entries` has refused those that may run for ever.
    """

    targets: tuple[str, ...]
    ignore: tuple[str, ...]

    def __contains__(self, name: str) -> bool:
        if len(name) > LONGEST_NAME and any(entry.startswith("re:") for entry in self.targets + self.ignore):
            raise RiaError(f"{name[:60]}...: a module's name of {len(name)} characters. The checkpoint is damaged.")
        return is_match(name, LINEAR, self.targets, self.ignore)

    def by_name(self, name: str) -> bool:
        """Whether a target other than a class matches."""
        return any(match_name(name, target) for target in self.targets)


@dataclass(frozen=True)
class CompressedTensorsConfig:
    """Which linears of such a checkpoint are pruned, and how their values are stored.

    Attributes:
        pruned: the linears that are 2:4.
        dense: they are stored with their zeros.
        groups: linears that are quantized, and how.
        kv_cache_scheme: of an fp8 cache, for which the checkpoint holds two scales per layer, of keys and values.
    """

    pruned: Selection
    dense: bool
    groups: tuple[tuple[Selection, WeightScheme], ...] = field(default=())
    kv_cache_scheme: Mapping[str, Any] | None = None

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> "CompressedTensorsConfig":
        """Parse a `quantization_config` that `is_24_checkpoint` accepts.

        Raises:
            RiaError: a quantization that is not served here, or a value of the wrong type; names the key.
        """
        if config.get("transform_config"):
            raise RiaError(f"{WHERE}.transform_config: rotated weights are not served. Get a model without them.")
        sparsity = config["sparsity_config"]
        dense = sparsity["format"] == "dense"
        ignore = _entries(config, "ignore", WHERE)
        groups = []
        for name, group in _mapping(config, "config_groups", WHERE).items():
            where = f"{WHERE}.config_groups.{name}"
            if not isinstance(group, Mapping):
                raise RiaError(f"{where} is {reprlib.repr(group)}, expected an object.")
            if _mapping(group, "weights", where):
                selection = Selection(_entries(group, "targets", where), ignore)
                groups.append((selection, _scheme(where, group, dense)))
        where = f"{WHERE}.sparsity_config"
        pruned = Selection(_entries(sparsity, "targets", where), _entries(sparsity, "ignore", where))
        return cls(pruned, dense, tuple(groups), _kv_cache_scheme(config))

    def scheme(self, name: str) -> WeightScheme:
        """How the linear `name` is stored. A group that names it goes before one that takes all linears."""
        found = [(scheme, selection.by_name(name)) for selection, scheme in self.groups if name in selection]
        default = found[0][0] if found else WeightScheme(dense=self.dense)
        return next((scheme for scheme, by_name in found if by_name), default)


def _scheme(where: str, group: Mapping[str, Any], dense: bool) -> WeightScheme:
    weights, inputs = (_mapping(group, key, where) for key in ("weights", "input_activations"))
    if group.get("format") not in WEIGHT_FORMATS:
        raise RiaError(f"{where}.format: {reprlib.repr(group['format'])} is not served.")
    weight_format = _quantized(weights)
    strategy, symmetric = weights.get("strategy"), weights.get("symmetric")
    if weight_format is None or strategy not in ("tensor", "channel") or symmetric not in (True, None):
        shown = reprlib.repr({key: weights.get(key) for key in ("type", "num_bits", "strategy", "symmetric")})
        raise RiaError(
            f"{where}: 2:4 weights of {shown} are not served, only symmetric int8 and fp8, by tensor or by channel."
        )
    activations = _quantized(inputs)
    return WeightScheme(weight_format, dense, strategy, activations and activations.parts[0].dtypes[0])


def _kv_cache_scheme(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    scheme = _mapping(config, "kv_cache_scheme", WHERE)
    if not scheme:
        return None
    wanted = {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True}
    for key, value in (wanted | {"dynamic": False}).items():
        given = scheme.get(key, False if key == "dynamic" else None)
        if given != value:
            raise RiaError(
                f"{WHERE}.kv_cache_scheme.{key}: {reprlib.repr(given)} is not served, only {value!r} is (an fp8 cache "
                "with one scale per layer). Remove kv_cache_scheme from config.json to serve with a cache in the "
                "model's dtype."
            )
    return dict(wanted)


def _quantized(quantization: Mapping[str, Any]) -> WeightFormat | None:
    # Not a look-up, because the values may be of any type, unhashable ones included.
    asked = quantization.get("type"), quantization.get("num_bits")
    return next((one for kind, one in QUANTIZED.items() if kind == asked), None)


def _mapping(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise RiaError(f"{where}.{key} is {reprlib.repr(value)}, expected an object.")
    return value or {}


def _entries(config: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The names and patterns of a list; empty if it is missing or null."""
    value = config.get(key)
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
        raise RiaError(f"{where}.{key} is {reprlib.repr(value)}, expected a list of names.")
    for entry in value:
        if entry.startswith("re:"):
            compile_pattern(entry[3:], f"{where}.{key}")
    return tuple(value)
