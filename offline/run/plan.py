"""Which linears are pruned, and which stay dense, and why."""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.format.layer_schema import Fold
from ria_vllm.format.sparse24 import IN_FEATURES_MULTIPLE
from ria_vllm.offline.experts.plan import describe_experts, experts_left_dense, plan_experts, widths_of_experts
from ria_vllm.offline.model.run.architecture import output_heads
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.model.topology import Group, Topologies, linears_of, rank_blocks
from ria_vllm.offline.recipe import Recipe
from ria_vllm.vllm_quirks import fused_sets, served_dense


@dataclass(frozen=True)
class Plan:
    """What happens to each linear.

    pruned: layer index -> names of linears, relative to the layer.
    dense: written name -> why.
    warnings: for the user.
    together: the written names of all pruned linears, in sets that can only be left dense as a whole.
    experts: layer index -> paths of the experts that are pruned, relative to the layer.
    blocks: layer index -> linears whose fold does not hold, because a producer stays dense -> the blocks that their
        permutations then have to keep to.
    """

    pruned: Mapping[int, frozenset[str]]
    dense: Mapping[str, str]
    warnings: tuple[str, ...]
    together: tuple[frozenset[str], ...]
    experts: Mapping[int, frozenset[str]]
    blocks: Mapping[int, Mapping[str, int]]

    @property
    def last(self) -> int:
        """The last layer of which anything is pruned."""
        return max(index for index in self.pruned if self.pruned[index] or self.experts[index])

    def groups(self, index: int, stage: Iterable[Group]) -> list[Group]:
        """The groups of a stage without the linears that stay dense."""
        blocks = self.blocks[index]
        left = [
            replace(
                group,
                linears=tuple(n for n in group.linears if n in self.pruned[index]),
                experts=group.experts if group.experts in self.experts[index] else None,
                blocks=blocks.get(group.linears[0], group.blocks) if group.linears else group.blocks,
            )
            for group in stage
        ]
        return [group for group in left if group.linears or group.experts]


def make_plan(model: StreamedModel, topologies: Topologies, recipe: Recipe, sensitive: Iterable[str] = ()) -> Plan:
    """Decide for every linear of the model.

    Args:
        sensitive: written names of linears that stay dense because pruning them would cost most quality.

    Raises:
        RiaError: nothing is left to prune, or layers differ in their experts.
    """
    sensitive = set(sensitive)
    pruned: dict[int, frozenset[str]] = {}
    dense: dict[str, str] = {}
    warnings: list[str] = []
    misfits: dict[str, int] = {}
    together: list[frozenset[str]] = []
    mixtures: dict[int, frozenset[str]] = {}
    left_dense: dict[str, str] = {}
    blocks: dict[int, dict[str, int]] = {}
    for index, layer in enumerate(model.layers):
        linears = _linears(layer)
        written = {name: model.written_linear(index, name) for name in linears}
        topology, reasons = topologies.of(index), served_dense(layer)
        for name, module in linears.items():
            if name in reasons:
                continue
            if name in topology.dense:
                reasons[name] = topology.dense[name]
            elif reason := _reason(model, index, name, module, recipe):
                reasons[name] = reason
            elif written[name] in sensitive:
                reasons[name] = "--skip-sensitive"
            if "in-features" in reasons.get(name, ""):
                misfits[f"{name}: {reasons[name]}"] = misfits.get(f"{name}: {reasons[name]}", 0) + 1
        for name in [name for name in linears if name not in reasons]:
            partner = next((other for other in topology.fused_with(name, linears) if other in reasons), None)
            if partner:
                sure = any({name, partner} <= names for names in fused_sets(linears))
                reasons[name] = f"{'served' if sure else 'may be served'} as one with {partner}"
                if written[partner] not in sensitive:
                    fuses = "fuses it" if sure else "may fuse it"
                    warnings.append(f"{written[name]} stays dense too: vLLM {fuses} with {written[partner]}.")
        dense |= {written[name]: reason for name, reason in reasons.items()}
        pruned[index] = frozenset(linears) - frozenset(reasons)
        blocks[index] = {
            fold.consumer: rank_blocks(linears[fold.consumer].in_features)
            for fold in topology.folds
            # Heads are whole on each rank.
            if fold.coupling == "elementwise" and fold.consumer in pruned[index] and not _holds(fold, pruned[index])
        }
        sets = {frozenset(topology.fused_with(name, pruned[index])) for name in pruned[index]}
        together += [frozenset(written[name] for name in names) for names in sets]
        mixtures[index], left = plan_experts(model, index, topology, recipe, sensitive)
        dense |= left
        left_dense |= left
        together += [frozenset(model.experts[index][path].linears) for path in mixtures[index]]
    warnings = [f"{what}; left dense in {count} layers." for what, count in misfits.items()] + warnings
    warnings += [*topologies.warnings, *experts_left_dense(left_dense)] + _unknown_tensors(model)
    if not any(pruned.values()) and not any(mixtures.values()):
        first = next(iter(dense.items()))
        raise RiaError(f"nothing is left to prune. For example, {first[0]}: {first[1]}.")
    describe_experts(model, mixtures)  # which refuses experts that differ
    outside = {model.names.linear(name): why for name, why in _outside(model)}
    copied = dict.fromkeys(model.unknown_linears(), "in the files, but no part of the model that transformers builds")
    dense = copied | outside | dense
    return Plan(pruned, dense, tuple(warnings), tuple(together), mixtures, blocks)


def widths(model: StreamedModel, recipe: Recipe) -> dict[str, int]:
    """Written name -> in-features, of all linears that may be pruned. Experiments or sensitivity keep some dense."""
    found = {}
    for index, layer in enumerate(model.layers):
        dense = served_dense(layer)
        for name, module in _linears(layer).items():
            if name not in dense and not _reason(model, index, name, module, recipe):
                found[model.written_linear(index, name)] = module.in_features
        found |= widths_of_experts(model, index, recipe)
    return found


def _linears(layer: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def _reason(model: StreamedModel, index: int, name: str, module: nn.Linear, recipe: Recipe) -> str | None:
    """Why a linear has to stay dense, as far as no experiment is needed to tell."""
    width, full = module.in_features, model.layer_prefix(index) + name
    tied = model.model.all_tied_weights_keys
    if f"{full}.weight" in {*tied, *tied.values()}:
        return "its weights are another layer's, too"
    if not model.names.is_own(full):
        return "its weights are stored as a part of others"
    if not model.names.is_found_compressed(full):
        return "transformers renames its weight, and would not find it compressed"
    if recipe.ignores(model.written_linear(index, name)):
        return "--ignore"
    if width % IN_FEATURES_MULTIPLE:
        return f"its {width} in-features are not a multiple of {IN_FEATURES_MULTIPLE}"
    return None


def _holds(fold: Fold, pruned: Container[str]) -> bool:
    return all(producer.name in pruned for producer in fold.producers)


def _outside(model: StreamedModel) -> Iterator[tuple[str, str]]:
    """The linears outside the decoder layers, by their names in the model, and why they stay dense."""
    heads = output_heads(model.model, model.decoder_path)
    for name in linears_of(model.model):
        if not name.startswith(f"{model.layers_path}."):
            of_the_text = not model.is_wrapper or name.startswith(f"{model.decoder_path}.")
            of_the_text = of_the_text or model.model.get_submodule(name) in heads
            yield name, "outside the decoder layers" if of_the_text else "outside the text decoder"


def _unknown_tensors(model: StreamedModel) -> list[str]:
    """A warning about tensors that the model does not use, such as layers for multi-token prediction."""
    unknown = model.names.unknown
    if not unknown:
        return []
    which = unknown[0] if len(unknown) == 1 else f"{unknown[0]} and {len(unknown) - 1} more tensors"
    kind = type(model.model).__name__
    return [f"{model.how_copied(unknown)}: {which}, not part of {kind} as transformers builds it."]


def most_sensitive(
    records: Mapping[str, Mapping[str, Any]], fraction: float, together: Iterable[frozenset[str]]
) -> list[str]:
    """The linears whose pruning loses most per weight, up to `fraction` of all weights.

    The loss of a linear is the squared relative error of its output. A set that would exceed the fraction is skipped;
    smaller ones may still fit.

    Args:
        records: written name -> record with `shape` and `error_after`.
        together: the same names, in sets that can only be left dense as a whole.

    Returns:
        Written names, the sets with the largest loss first.
    """
    sizes = {name: record["shape"][0] * record["shape"][1] for name, record in records.items()}
    lost = {
        names: sum(records[n]["error_after"] ** 2 for n in names) / sum(sizes[n] for n in names) for names in together
    }
    budget = fraction * sum(sizes.values())
    chosen: list[str] = []
    for names in sorted(lost, key=lambda names: (-lost[names], min(names))):
        size = sum(sizes[n] for n in names)
        if size <= budget:
            budget -= size
            chosen += sorted(names)
    return chosen
