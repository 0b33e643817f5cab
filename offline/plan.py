"""Which linears are pruned, and which stay dense and why."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.streaming import StreamedModel
from ria_vllm.offline.topology import Group, Topology, fused_with, linears_of
from ria_vllm.schema import REARRANGED_BY_VLLM
from ria_vllm.sparse24 import IN_FEATURES_MULTIPLE


@dataclass(frozen=True)
class Plan:
    """pruned: full names of linears, per layer index, relative to it; dense: full name -> why; warnings for the user."""

    pruned: Mapping[int, frozenset[str]]
    dense: Mapping[str, str]
    warnings: tuple[str, ...]

    def groups(self, index: int, stage: Iterable[Group]) -> list[Group]:
        """The groups of a stage without the linears that stay dense."""
        left = [Group(tuple(n for n in group.linears if n in self.pruned[index]), group.heads) for group in stage]
        return [group for group in left if group.linears]


def make_plan(model: StreamedModel, topology: Topology, recipe: Recipe, sensitive: Iterable[str] = ()) -> Plan:
    """Decide for every linear of the model.

    Args:
        sensitive: full names of linears that are to stay dense for quality.

    Raises:
        RiaError: nothing is left to prune.
    """
    sensitive = set(sensitive)
    pruned: dict[int, frozenset[str]] = {}
    dense: dict[str, str] = {}
    warnings: list[str] = []
    misfits: dict[str, int] = {}
    for index, layer in enumerate(model.layers):
        prefix = model.layer_prefix(index)
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        reasons: dict[str, str] = {}
        for name, module in linears.items():
            width = module.in_features
            if name in topology.dense:
                reasons[name] = topology.dense[name]
            elif name not in topology.linears:
                reasons[name] = "not in the other layers"
            elif recipe.ignores(prefix + name):
                reasons[name] = "--ignore"
            elif prefix + name in sensitive:
                reasons[name] = "--skip-sensitive"
            elif recipe.served and width % IN_FEATURES_MULTIPLE:
                reasons[name] = f"its {width} in-features are not a multiple of {IN_FEATURES_MULTIPLE}"
            elif recipe.pattern.structured and width % recipe.pattern.m:
                reasons[name] = f"its {width} in-features do not divide into groups of {recipe.pattern.m}"
            if "in-features" in reasons.get(name, ""):
                misfits[f"{name}: {reasons[name]}"] = misfits.get(f"{name}: {reasons[name]}", 0) + 1
        for name in [name for name in linears if name not in reasons]:
            partner = next((other for other in fused_with(name, linears) if other in reasons), None)
            if partner:
                reasons[name] = f"served as one with {partner}"
                if prefix + partner not in sensitive:
                    warnings.append(f"{prefix}{name} stays dense too: vLLM serves it as one with {prefix}{partner}.")
        dense |= {prefix + name: reason for name, reason in reasons.items()}
        pruned[index] = frozenset(linears) - frozenset(reasons)
    warnings = [f"{what}; left dense in {count} layers." for what, count in misfits.items()] + warnings
    warnings += _experts(model)
    family = model.model.config.model_type
    if family in REARRANGED_BY_VLLM:
        warnings.append(f"vLLM cannot serve a compressed {family}; `ria-vllm export` will make a dense folder of it.")
    if not any(pruned.values()):
        first = next(iter(dense.items()))
        raise RiaError(f"nothing is left to prune: {first[0]}: {first[1]}, and likewise the others.")
    outside = [n for n in linears_of(model.model) if not n.startswith(f"{model.layers_path}.")]
    return Plan(pruned, {name: "outside the decoder layers" for name in outside} | dense, tuple(warnings))


def _experts(model: StreamedModel) -> list[str]:
    has_experts = any(name.rpartition(".")[2] == "experts" for name, _ in model.layers[-1].named_modules())
    return ["the experts of this mixture-of-experts model stay dense; only its other linears are pruned."] * has_experts


def most_sensitive(records: Mapping[str, Mapping[str, Any]], fraction: float) -> list[str]:
    """The linears whose pruning loses most for each byte it saves, up to `fraction` of all weights.

    What a linear loses is the squared relative error of its output. Linears that are served as one go together; a set
    that would pass the fraction is left out and smaller ones still have their chance.

    Args:
        records: full name -> record with `shape` and `error_after`.
    """
    sizes = {name: record["shape"][0] * record["shape"][1] for name, record in records.items()}
    sets = {frozenset(fused_with(name, records)) for name in records}
    lost = {names: sum(records[n]["error_after"] ** 2 for n in names) / sum(sizes[n] for n in names) for names in sets}
    budget = fraction * sum(sizes.values())
    chosen: list[str] = []
    for names in sorted(sets, key=lambda names: (-lost[names], min(names))):
        size = sum(sizes[n] for n in names)
        if size <= budget:
            budget -= size
            chosen += sorted(names)
    return chosen
