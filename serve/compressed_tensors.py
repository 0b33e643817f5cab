"""2:4 checkpoints of compressed-tensors, which vLLM itself no longer serves."""

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ria_vllm.errors import RiaError
from ria_vllm.serve.patterns import compile_pattern
from ria_vllm.serve.weight_scheme import QUANTIZED_DTYPES, Storage

WHERE = "config.json: quantization_config"
SPARSE_FORMATS = ("sparse-24-bitmask", "dense")
LONGEST_NAME = 300
"""Characters of a module's name; a pattern may take long to match a longer one."""
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


def _matches(entry: str, name: str) -> bool:
    if entry.startswith("re:"):
        if len(name) > LONGEST_NAME:
            raise RiaError(f"{name[:60]}...: a module's name of {len(name)} characters. The checkpoint is damaged.")
        return re.match(entry[3:], name) is not None
    return entry in ("Linear", name)


@dataclass(frozen=True)
class Foreign:
    """Which linears of such a checkpoint are pruned, and how their values are stored.

    Attributes:
        kv_cache_scheme: the checkpoint holds a scale a layer for keys and one for values, in an fp8 cache.
    """

    pruned: Selection
    dense: bool
    groups: tuple[tuple[Selection, Storage], ...] = field(default=())
    kv_cache_scheme: Mapping[str, Any] | None = None

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> "Foreign":
        """Of a config that `claims` takes.

        Raises:
            RiaError: a quantization that is not served here, or a value of the wrong kind; the key is named.
        """
        if config.get("transform_config"):
            raise RiaError(f"{WHERE}.transform_config: rotated weights are not served. Get a version without.")
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
                groups.append((selection, _storage(where, group, dense)))
        where = f"{WHERE}.sparsity_config"
        pruned = Selection(_entries(sparsity, "targets", where), _entries(sparsity, "ignore", where))
        return cls(pruned, dense, tuple(groups), _kv_cache_scheme(config))

    def storage(self, name: str) -> Storage:
        """A group that names the linear goes before one that takes all of them."""
        found = [(storage, selection.by_name(name)) for selection, storage in self.groups if name in selection]
        return next((s for s, by_name in found if by_name), found[0][0] if found else Storage(self.dense))


def _storage(where: str, group: Mapping[str, Any], dense: bool) -> Storage:
    weights, inputs = (_mapping(group, key, where) for key in ("weights", "input_activations"))
    if group.get("format") not in WEIGHT_FORMATS:
        raise RiaError(f"{where}.format: {reprlib.repr(group['format'])} is not served.")
    dtype = _dtype(weights)
    strategy, symmetric = weights.get("strategy"), weights.get("symmetric")
    if dtype is None or strategy not in ("tensor", "channel") or symmetric not in (True, None):
        shown = reprlib.repr({key: weights.get(key) for key in ("type", "num_bits", "strategy", "symmetric")})
        raise RiaError(
            f"{where}: 2:4 weights of {shown} are not served; symmetric int8 and fp8, by tensor or by channel, are."
        )
    return Storage(dense, dtype, strategy, _dtype(inputs))


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
                "with a scale a layer). Take the key kv_cache_scheme out of config.json: the cache then has the model's dtype."
            )
    return dict(wanted)


def _dtype(quantization: Mapping[str, Any]) -> torch.dtype | None:
    asked = quantization.get("type"), quantization.get("num_bits")
    return next((dtype for kind, dtype in QUANTIZED_DTYPES.items() if kind == asked), None)


def _mapping(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise RiaError(f"{where}.{key} is {reprlib.repr(value)}, expected an object.")
    return value or {}


def _entries(config: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The names and patterns of a list; none where it is missing or null."""
    value = config.get(key)
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
        raise RiaError(f"{where}.{key} is {reprlib.repr(value)}, expected a list of names.")
    for entry in value:
        if entry.startswith("re:"):
            compile_pattern(entry[3:], f"{where}.{key}")
    return tuple(value)
