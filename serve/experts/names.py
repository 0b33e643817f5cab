"""The experts of MoE layers in compressed-tensors' checkpoints, found by the names of their tensors.

config.json does not say which these are. They are stored one by one: LAYER.E.LINEAR.PART, where LAYER ends with
"experts" and E is a number.
"""

import re
from collections.abc import Callable, Iterable

from ria_vllm.errors import RiaError
from ria_vllm.format.weight_scheme import WeightScheme
from ria_vllm.serve.experts.stored import StoredExperts

EXPERTS = "experts"
NUMBER = re.compile("0|[1-9][0-9]{0,5}")
# What the linears of an expert are called. The last has no gate.
KINDS = (
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    {"gate": "w1", "up": "w3", "down": "w2"},
    {"up": "up_proj", "down": "down_proj"},
)
WAY_OUT = "Compress the dense original with `ria-vllm compress`."

# The tensors of a linear in plain floating point, which vLLM loads itself.
PLAIN = {"weight", "bias"}
# How the names of other tensors end.
ENDINGS = ("compressed", "bitmask", "packed", "meta", "scale", "scale_inv", "scales", "blocks", "zero_point", "g_idx")

Linears = dict[tuple[int, str], set[str]]
"""(expert, LINEAR) -> the PARTs that the files hold."""


def check_stacked(tensors: Iterable[str], where: str) -> None:
    """Check that no tensor holds several experts in a form that only compressed-tensors has.

    Stacks in plain floating point are vLLM's own business.

    Raises:
        RiaError: one does; names it.
    """
    for name in sorted(tensors):
        _, found, rest = f".{name}".partition(f".{EXPERTS}.")
        if found and not rest[:1].isdigit() and rest.endswith(ENDINGS):
            raise RiaError(
                f"{where}: {name}: quantized or pruned experts are served from tensors of single experts only, and "
                f"this one holds several. {WAY_OUT}"
            )


def experts_by_name(
    tensors: Iterable[str],
    scheme_of: Callable[[str], WeightScheme],
    claims_24: Callable[[str], bool],
    where: str,
) -> dict[str, StoredExperts]:
    """The layers whose experts our layers serve, by the name of their experts.

    These are all quantized ones, and those in plain floating point that config.json calls 2:4; `match_experts` gives
    the latter back to vLLM if the model has no layer for them. Whether the weights are 2:4 shows when they are loaded.

    Args:
        tensors: all names, after `packed_forms.Translation.names`.
        scheme_of: how a linear is stored, by its name.
        claims_24: whether a linear is 2:4, as far as config.json or the names of its tensors tell.
        where: the folder or repository, for errors.

    Raises:
        RiaError: the linears of a layer's experts are not stored alike, one is missing, or they have unknown names;
            names the layer.
    """
    found = {}
    for layer, linears in _layers(tensors).items():
        names = {one: f"{layer}.{one[0]}.{one[1]}" for one in linears}
        first, *others = names.values()
        scheme = scheme_of(first)
        if other := next((name for name in others if scheme_of(name) != scheme), None):
            raise RiaError(
                f"{where}: {layer}: the linears of a layer's experts must be stored alike, but {first} has "
                f"{scheme}, and {other} has {scheme_of(other)}. {WAY_OUT}"
            )
        plain, claimed = scheme == WeightScheme(dense=True), any(map(claims_24, names.values()))
        if plain:
            _check_plain(names, linears, where)
        kinds = _kinds(linears)
        if kinds is None and not plain:
            has = " and ".join(sorted({linear for _, linear in linears}))
            known = ", or ".join(" and ".join(one.values()) for one in KINDS)
            raise RiaError(f"{where}: {layer}: experts of {has} are not served, only of {known}. {WAY_OUT}")
        if kinds is not None and (claimed or not plain):
            found[layer] = _experts(layer, kinds, linears, claimed, where)
    return found


def plain_experts(modules: Iterable[str]) -> dict[str, StoredExperts]:
    """The layers whose experts are stored one by one in plain floating point, by the name of their experts, as far as
    the linears have known names.

    Args:
        modules: the names of linears, and of others with a weight.
    """
    found = {}
    for layer, linears in _layers(f"{name}.weight" for name in modules).items():
        kinds = _kinds(linears)
        if kinds is not None and len(linears) == len(kinds) * len({expert for expert, _ in linears}):
            found[layer] = _experts(layer, kinds, linears, False, layer)
    return found


def _kinds(linears: Linears) -> dict[str, str] | None:
    """Which linear is the gate, which up and which down; None if they have other names."""
    return next((one for one in KINDS if set(one.values()) == {linear for _, linear in linears}), None)


def _layers(tensors: Iterable[str]) -> dict[str, Linears]:
    layers: dict[str, Linears] = {}
    for name in tensors:
        layer, *rest = name.rsplit(".", 3)
        if len(rest) == 3 and layer.rpartition(".")[2] == EXPERTS and NUMBER.fullmatch(rest[0]):
            layers.setdefault(layer, {}).setdefault((int(rest[0]), rest[1]), set()).add(rest[2])
    return layers


def _check_plain(names: dict[tuple[int, str], str], linears: Linears, where: str) -> None:
    for one, parts in linears.items():
        if more := parts - PLAIN:
            raise RiaError(
                f"{where}: {names[one]}.{min(more)}: config.json's quantization_config says nothing of such weights of "
                "this linear. config.json belongs to another model; get the files again."
            )


def _experts(layer: str, kinds: dict[str, str], linears: Linears, claimed: bool, where: str) -> StoredExperts:
    count = len({expert for expert, _ in linears})
    wanted = ((expert, linear) for expert in range(count) for linear in kinds.values())
    if missing := next((one for one in wanted if one not in linears), None):
        raise RiaError(f"{where}: {layer}.{missing[0]}.{missing[1]} is in none of the weight files. Get them again.")
    patterns = {kind: f"{layer}.{{e}}.{linear}" for kind, linear in kinds.items()}
    return StoredExperts(layer, count, patterns, {}, claimed, WAY_OUT)
