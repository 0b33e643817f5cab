"""2:4 checkpoints of compressed-tensors, which vLLM itself no longer serves."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ria_vllm.compressed_tensors import marlin24
from ria_vllm.compressed_tensors.packed_forms import Marlin24, PackedForm, PackQuantized
from ria_vllm.compressed_tensors.patterns import check_pattern, matches_pattern
from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FORMATS, GROUP_SIZES, IntFormat
from ria_vllm.format.weight_format import WeightFormat
from ria_vllm.format.weight_scheme import WeightScheme

WHERE = "config.json: quantization_config"
ALL_PATTERNS = 20_000  # characters of all patterns together: each is matched with each name
SPARSE_FORMATS = ("sparse-24-bitmask", "dense")
MARLIN, PACKED, WHOLE, MIXED = "marlin-24", "pack-quantized", "int-quantized", "mixed-precision"
# Of a group of quantized linears. A checkpoint whose groups differ is of mixed precision.
WEIGHT_FORMATS = (None, "dense", "sparse-24-bitmask", WHOLE, "float-quantized", "naive-quantized", MARLIN, PACKED)

# How config.json describes the weights: (type, number of bits, strategy, group size) -> the format of the values.
SERVED = [
    ((words["num_bits"], words["type"], strategy, one.group_size), one)
    for one in FORMATS.values()
    if (words := one.quantization)
    for strategy in (("group",) if one.group_size else ("tensor", "channel"))
]
# Values of `actorder` under which the columns of a group are neighbours.
ORDERS = (None, False, "weight", "static")
SHOWN = ("num_bits", "type", "strategy", "group_size", "symmetric")

CLASSES = ("Linear", "Module")
"""compressed-tensors also matches targets by a module's class. Only linears are looked up here."""


def quantization_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of its weights where vLLM looks for it; empty if that is nothing."""
    found = (place.get(key) for place, key in quantization_places(content))
    return next((one for one in found if isinstance(one, Mapping)), {})


def quantization_places(content: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """Where vLLM looks for it, as objects in config.json and their keys: the model's own, its text decoder's, and under
    the name that it had at first."""
    text = content.get("text_config")
    places = (content, "quantization_config"), (text, "quantization_config"), (content, "compression_config")
    return [(place, key) for place, key in places if isinstance(place, Mapping)]


def is_24_checkpoint(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is one of compressed-tensors, with 2:4 weights in a form that is served here.

    Weights in `marlin-24` are always 2:4, whatever `sparsity_config` says.
    """
    if config.get("quant_method") != "compressed-tensors":
        return False
    groups, sparsity = config.get("config_groups"), config.get("sparsity_config")
    of_groups = (
        [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    )
    return any(one.get("format") == MARLIN for one in (config, *of_groups)) or (
        isinstance(sparsity, Mapping)
        and bool(sparsity.get("targets"))
        and sparsity.get("sparsity_structure") == "2:4"
        and sparsity.get("format") in SPARSE_FORMATS
        and config.get("format") in (*WEIGHT_FORMATS, MIXED)
    )


def matches(name: str, entry: str) -> bool:
    """Whether the linear `name` is meant by an entry of `targets` or `ignore`: its name, its class, or re:REGEX.

    Raises:
        RiaError: see `matches_pattern`.
    """
    if entry.startswith("re:"):
        return matches_pattern(name, entry[3:], WHERE)
    return entry == name or entry in CLASSES


@dataclass(frozen=True)
class Selection:
    """Linears that an entry of `targets` means, and none of `ignore`, see `matches`."""

    targets: tuple[str, ...]
    ignore: tuple[str, ...]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._any(name, self.targets) and not self._any(name, self.ignore)

    @staticmethod
    def _any(name: str, entries: tuple[str, ...]) -> bool:
        return any(matches(name, entry) for entry in entries)


@dataclass(frozen=True)
class Group:
    """Linears that are quantized alike.

    Attributes:
        selection: which these are.
        scheme: how their values are stored once they are unpacked.
        form: how they are packed; None if they are not.
    """

    selection: Selection
    scheme: WeightScheme
    form: PackedForm | None

    def __str__(self) -> str:
        return str(self.scheme) if self.form is None else f"{type(self.form).__name__} {self.scheme}"


@dataclass(frozen=True)
class CompressedTensorsConfig:
    """Which linears of such a checkpoint are pruned, and how their values are stored.

    Attributes:
        pruned: the linears that are 2:4.
        dense: they are stored with their zeros, those in marlin-24 excepted.
        groups: linears that are quantized, and how.
    """

    pruned: Selection
    dense: bool
    groups: tuple[Group, ...] = field(default=())

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> "CompressedTensorsConfig":
        """Parse a `quantization_config` that `is_24_checkpoint` accepts.

        Raises:
            RiaError: a quantization that is not served here, or a value of the wrong type; names the key.
        """
        if config.get("transform_config"):
            raise RiaError(f"{WHERE}.transform_config: rotated weights are not served. Get a model without them.")
        sparsity = _mapping(config, "sparsity_config", WHERE)
        dense = sparsity.get("format") != "sparse-24-bitmask"
        ignore = _entries(config, "ignore", WHERE)
        groups = []
        for name, group in _mapping(config, "config_groups", WHERE).items():
            where = f"{WHERE}.config_groups.{name}"
            if not isinstance(group, Mapping):
                raise RiaError(f"{where} is {reprlib.repr(group)}, expected an object.")
            if _mapping(group, "weights", where):
                selection = Selection(_entries(group, "targets", where), ignore)
                stored = _stored(where, group, config.get("format"), dense)
                groups.append(Group(selection, *stored))
        tiled = tuple(target for one in groups if isinstance(one.form, Marlin24) for target in one.selection.targets)
        where = f"{WHERE}.sparsity_config"
        pruned = Selection(_entries(sparsity, "targets", where), _entries(sparsity, "ignore", where))
        targets = (target for one in groups for target in one.selection.targets)
        patterns = [one for one in (*ignore, *pruned.targets, *pruned.ignore, *targets) if one.startswith("re:")]
        if sum(map(len, patterns)) > ALL_PATTERNS:
            raise RiaError(f"{WHERE}: {len(patterns)} patterns of more than {ALL_PATTERNS} characters. Give names.")
        return cls(Selection(tiled, ignore) if tiled else pruned, dense, tuple(groups))

    def scheme(self, name: str) -> WeightScheme:
        """How the linear `name` is stored, once it is unpacked."""
        group = self._group(name)
        return WeightScheme(dense=self.dense) if group is None else group.scheme

    def form(self, name: str) -> PackedForm | None:
        """How the linear `name` is packed; None if it is not."""
        group = self._group(name)
        return None if group is None else group.form

    def weight_format(self, name: str) -> WeightFormat | None:
        """What the values of the linear `name` are; None if it is not quantized."""
        group = self._group(name)
        return None if group is None else group.scheme.format

    def _group(self, name: str) -> Group | None:
        """Of the groups that select a linear, the one that compressed-tensors takes.

        That is the group of the most specific target: an exact name, then the alphabetically first pattern, then a
        class. Of groups that share the target, it is the last.
        """
        found = {
            target: group
            for group in self.groups
            if name in group.selection
            for target in group.selection.targets
            if matches(name, target)
        }
        first = min(found, key=lambda target: (target in CLASSES, target.startswith("re:"), target), default=None)
        return None if first is None else found[first]


def _stored(where: str, group: Mapping[str, Any], of_all: Any, dense: bool) -> tuple[WeightScheme, PackedForm | None]:
    """How a group's linears are stored. `of_all`: the format in config.json that groups need not repeat."""
    weights, inputs = (_mapping(group, key, where) for key in ("weights", "input_activations"))
    form = group.get("format") or of_all
    packs = form in (MARLIN, PACKED)
    if form not in WEIGHT_FORMATS or (form == PACKED and not dense):
        instead = "" if dense else " with a sparsity_config.format of sparse-24-bitmask"
        raise RiaError(f"{where}.format: {reprlib.repr(form)} is not served{instead}.")
    weight_format, strategy = _weight_format(where, weights), weights["strategy"]
    if form == MARLIN and (weight_format not in marlin24.FORMATS or strategy == "tensor"):
        raise RiaError(
            f"{where}: in marlin-24, weights of {_shown(weights)} are not served, only symmetric int4 and int8, by "
            "channel or in groups of 128. Quantize the model again with one of these."
        )
    integers = weight_format if isinstance(weight_format, IntFormat) else None
    if packs and integers is None:
        raise RiaError(
            f"{where}: weights of {_shown(weights)} are not served in the format {form}. It is for integers."
        )
    by_tensor: Literal["tensor", "channel"] = "tensor" if strategy == "tensor" else "channel"
    # The writer of marlin-24 rounds scales to float16. Others have the dtype of the model that was quantized.
    scales = torch.float16 if form == MARLIN and weight_format.group_size else torch.float32
    scheme = WeightScheme(weight_format, dense and form != MARLIN, by_tensor, _rounded_inputs(inputs), scales)
    if integers is not None and packs:
        return scheme, Marlin24(integers) if form == MARLIN else PackQuantized(integers)
    if integers is not None and integers.num_bits == 4:
        raise RiaError(f"{where}: int4 weights are only served in pack-quantized and marlin-24.")
    return scheme, None


def _weight_format(where: str, weights: Mapping[str, Any]) -> WeightFormat:
    asked = tuple(weights.get(key) for key in ("num_bits", "type", "strategy"))
    size = weights.get("group_size") if weights.get("strategy") == "group" else None
    # Not a look-up, because the values may be of any type, unhashable ones included.
    found = next((one for words, one in SERVED if words == (*asked, size)), None)
    if found is None or weights.get("symmetric") not in (True, None):
        raise RiaError(
            f"{where}: 2:4 weights of {_shown(weights)} are not served, only symmetric ones: fp8 by tensor or by "
            f"channel, int4 and int8 also in groups of {', '.join(map(str, GROUP_SIZES))}. Quantize the model again "
            "with one of these."
        )
    order = weights.get("actorder")
    if (order.lower() if isinstance(order, str) else order) not in ORDERS:
        raise RiaError(
            f"{where}.weights.actorder: {reprlib.repr(order)} is not served: it groups columns in the order of their "
            'activations. Quantize the model again with actorder: "weight", or without it.'
        )
    return found


def _rounded_inputs(inputs: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype to which inputs are rounded, with a scale for each token even if the checkpoint has one for all.

    None for inputs that need a zero point or finer scales: they are not rounded, which is more exact.
    """
    asked = inputs.get("type"), inputs.get("num_bits")
    if asked == ("float", 8):
        return torch.float8_e4m3fn
    fits = inputs.get("symmetric") in (True, None) and inputs.get("strategy") in ("tensor", "token", None)
    return torch.int8 if asked == ("int", 8) and fits else None


def _shown(weights: Mapping[str, Any]) -> str:
    return reprlib.repr({key: weights[key] for key in SHOWN if key in weights})


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
            check_pattern(entry[3:], f"{where}.{key}")
    return tuple(value)
