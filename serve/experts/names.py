"""The experts of MoE layers that a checkpoint stores one by one, found by the names of their tensors.

config.json does not say which these are: LAYER.E.LINEAR.PART, where LAYER ends with "experts" and E is a number.
"""

import re
from collections.abc import Iterable

from ria_vllm.errors import RiaError
from ria_vllm.format.stacks import LayerExperts

EXPERTS = "experts"
NUMBER = re.compile("0|[1-9][0-9]{0,5}")
# What the linears of an expert are called. The last has no gate.
KINDS = (
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    {"gate": "w1", "up": "w3", "down": "w2"},
    {"up": "up_proj", "down": "down_proj"},
)
WAY_OUT = "Compress the dense original with `ria-vllm compress`."

# How the names of tensors end that are not in plain floating point.
ENDINGS = ("compressed", "bitmask", "packed", "meta", "scale", "scale_inv", "scales", "blocks", "zero_point", "g_idx")


def check_plain(tensors: Iterable[str], where: str) -> None:
    """Check that the experts of a checkpoint of compressed-tensors are in plain floating point: vLLM's own business.

    Raises:
        RiaError: a tensor of theirs is not; names it.
    """
    for name in sorted(tensors):
        _, found, _ = f".{name}".partition(f".{EXPERTS}.")
        if found and name.endswith(ENDINGS):
            raise RiaError(
                f"{where}: {name}: experts that another program has pruned or quantized are not served. {WAY_OUT}"
            )


def plain_experts(modules: Iterable[str]) -> dict[str, LayerExperts]:
    """The layers whose experts are stored one by one in plain floating point, by the name of their experts, as far as
    the linears have known names.

    Args:
        modules: the names of linears, and of others with a weight.
    """
    layers: dict[str, set[tuple[int, str]]] = {}
    for name in modules:
        layer, *rest = name.rsplit(".", 2)
        if len(rest) == 2 and layer.rpartition(".")[2] == EXPERTS and NUMBER.fullmatch(rest[0]):
            layers.setdefault(layer, set()).add((int(rest[0]), rest[1]))
    found = {}
    for layer, linears in layers.items():
        names, count = {linear for _, linear in linears}, len({expert for expert, _ in linears})
        kinds = next((one for one in KINDS if set(one.values()) == names), None)
        if kinds is not None and linears == {(expert, name) for expert in range(count) for name in names}:
            patterns = {kind: f"{layer}.{{e}}.{linear}" for kind, linear in kinds.items()}
            found[layer] = LayerExperts(layer, count, patterns)
    return found
