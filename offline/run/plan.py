"""Which linears are pruned, and which stay dense, and why."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.format.sparse24 import IN_FEATURES_MULTIPLE
from ria_vllm.offline.experts.plan import describe_experts, experts_left_dense, plan_experts, widths_of_experts
from ria_vllm.offline.model.run.architecture import output_heads
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.model.topology import Group, Topologies, Topology, Unit, linears_of
from ria_vllm.offline.recipe import BUDGETS, Recipe
from ria_vllm.vllm_quirks import fused_sets, served_dense

IGNORED = "--ignore"
INT8_MULTIPLE = 16  # of in-features: what kernels for dense matrices in int8 take


@dataclass(frozen=True)
class Kept:
    """The linears that have the pattern already: layer index -> names relative to the layer, paths of routed experts
    among them.

    left: the others that may be pruned; empty if none has the pattern already.
    """

    names: Mapping[int, frozenset[str]] = field(default_factory=dict)
    left: Mapping[int, frozenset[str]] = field(default_factory=dict)

    def reasons(self, index: int, recipe: Recipe) -> dict[str, str]:
        """Why those that are left in a layer stay dense, unless they are pruned."""
        reason = f"it is not {recipe.pattern}, as others of the model are (--prune-rest prunes it)"
        return {} if recipe.prune_rest else dict.fromkeys(sorted(self.left.get(index, ())), reason)


@dataclass(frozen=True)
class Plan:
    """What happens to each linear.

    kept: what keeps the mask that it has.
    pruned: layer index -> names of linears, relative to the layer.
    in_int8: the same of dense linears that are stored in int8.
    dense: written name -> why.
    warnings: for the user.
    experts: layer index -> paths of the experts that are pruned, relative to the layer.
    unfolded: layer index -> linears whose fold does not hold, because a producer stays dense.
    """

    pruned: Mapping[int, frozenset[str]]
    in_int8: Mapping[int, frozenset[str]]
    dense: Mapping[str, str]
    warnings: tuple[str, ...]
    experts: Mapping[int, frozenset[str]]
    unfolded: Mapping[int, frozenset[str]]
    kept: Kept

    @property
    def last(self) -> int:
        """The last layer of which anything is pruned or rounded."""
        return max(index for index in self.pruned if self.changed(index) or self.experts[index])

    def changed(self, index: int) -> frozenset[str]:
        """The linears of a layer that are pruned, or rounded."""
        return self.pruned[index] | self.in_int8[index]

    def groups(self, index: int, stage: Iterable[Group]) -> list[Group]:
        """The groups of a stage without the linears that stay as they are."""
        unfolded, changed = self.unfolded[index], self.changed(index)
        left = [
            replace(
                group,
                linears=tuple(n for n in group.linears if n in changed),
                experts=group.experts if group.experts in self.experts[index] else None,
                within_ranks=group.within_ranks or not unfolded.isdisjoint(group.linears),
            )
            for group in stage
        ]
        return [group for group in left if group.linears or group.experts]


def make_plan(
    model: StreamedModel,
    topologies: Topologies,
    recipe: Recipe,
    kept: Kept,
    chosen: frozenset[Unit] | None = None,
) -> Plan:
    """Decide for every linear of the model.

    Args:
        chosen: the sublayers that are pruned; None: all.

    Raises:
        RiaError: nothing is left to prune, or layers differ in their experts.
    """
    pruned: dict[int, frozenset[str]] = {}
    in_int8: dict[int, frozenset[str]] = {}
    routed: dict[int, frozenset[str]] = {}
    unfolded: dict[int, frozenset[str]] = {}
    dense: dict[str, str] = {}
    misfits: Counter[str] = Counter()
    warnings: list[str] = []
    left_dense: dict[str, str] = {}
    for index, layer in enumerate(model.layers):
        linears, topology = _linears(layer), topologies.of(index)
        unlike = kept.reasons(index, recipe)
        reasons = {name: why for name, why in unlike.items() if name in linears}
        reasons |= _beyond(topology, index, chosen, recipe) | _reasons(model, index, topology, recipe)
        misfits.update(f"{name}: {why}" for name, why in reasons.items() if name in unlike or "in-features" in why)
        fixed = {name for name, why in reasons.items() if not _can_be_rounded(linears[name], why, unlike.get(name))}
        for name, (partner, how) in _partners(topology, linears, reasons).items():
            one, other = (model.written_linear(index, either) for either in (name, partner))
            fuses = "fuses it" if how == "served" else "may fuse it"
            warnings.append(f"{one} stays dense too: vLLM {fuses} with {other}.")
            reasons[name] = f"{how} as one with {partner}"
        pruned[index] = frozenset(linears) - frozenset(reasons)
        in_int8[index] = frozenset(
            name for name in reasons if recipe.has_integers and fixed.isdisjoint(topology.fused_with(name, linears))
        )
        unfolded[index] = _unfolded(topology, pruned[index])
        routed[index], left = plan_experts(model, index, topology, recipe, unlike)
        left_dense |= left
        dense |= {model.written_linear(index, name): why for name, why in reasons.items()} | left
    if not any(pruned.values()) and not any(routed.values()) and not any(in_int8.values()):
        first = next(iter(dense.items()))
        raise RiaError(f"nothing is left to prune. For example, {first[0]}: {first[1]}.")
    describe_experts(model, routed)  # which refuses experts that differ
    warnings = [f"{what}; left dense in {count} layers." for what, count in misfits.items()] + warnings
    warnings += [*experts_left_dense(left_dense), *_unknown_tensors(model)]
    outside = dict.fromkeys(model.unknown_linears(), "in the files, but no part of the model that transformers builds")
    outside |= {model.names.linear(name): why for name, why in _outside(model)}
    return Plan(pruned, in_int8, outside | dense, tuple(warnings), routed, unfolded, kept)


def _beyond(topology: Topology, index: int, chosen: frozenset[Unit] | None, recipe: Recipe) -> dict[str, str]:
    """The linears of the sublayers that are not among those that are pruned, and why they stay dense."""
    left = [one for one in topology.sublayers if chosen is not None and (index, one.name) not in chosen]
    return {name: str(recipe.budget) for sublayer in left for name in sublayer.linears}


def _reasons(model: StreamedModel, index: int, topology: Topology, recipe: Recipe) -> dict[str, str]:
    """Linear of layer `index` -> why it stays dense, whatever becomes of those that vLLM fuses with it."""
    reasons = served_dense(model.layers[index])
    for name, module in _linears(model.layers[index]).items():
        reason = topology.dense.get(name) or _reason(model, index, name, module, recipe)
        if name not in reasons and reason:
            reasons[name] = reason
    return reasons


def _can_be_rounded(linear: nn.Linear, why: str, unlike: str | None) -> bool:
    """Whether a linear that stays dense for the reason `why` can be stored in int8.

    Args:
        unlike: the reason if it only lacks the pattern that others have.
    """
    return (
        why in (IGNORED, *BUDGETS.values(), unlike) or "in-features" in why
    ) and linear.in_features % INT8_MULTIPLE == 0


def _partners(
    topology: Topology, linears: Mapping[str, nn.Linear], reasons: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """Linear that stays dense because vLLM fuses it with one that does -> (this one, "served" or "may be served")."""
    found: dict[str, tuple[str, str]] = {}
    for name in [name for name in linears if name not in reasons]:
        others = (other for other in topology.fused_with(name, linears) if other in reasons or other in found)
        if partner := next(others, None):
            sure = any({name, partner} <= names for names in fused_sets(linears))
            found[name] = partner, "served" if sure else "may be served"
    return found


def _unfolded(topology: Topology, pruned: frozenset[str]) -> frozenset[str]:
    """`Plan.unfolded` of one layer, without heads, which are whole on each rank."""
    return frozenset(
        fold.consumer
        for fold in topology.folds
        if fold.coupling == "elementwise" and not pruned.issuperset(producer.name for producer in fold.producers)
    )


def widths(model: StreamedModel, recipe: Recipe) -> dict[str, int]:
    """Written name -> in-features, of all linears that may be pruned. Experiments keep some dense."""
    found: dict[str, int] = {}
    for index in range(len(model.layers)):
        able = linears_to_prune(model, index, recipe)
        found |= {model.written_linear(index, name): module.in_features for name, module in able.items()}
        found |= widths_of_experts(model, index, recipe)
    return found


def linears_to_prune(model: StreamedModel, index: int, recipe: Recipe) -> dict[str, nn.Linear]:
    """The linears of layer `index` that may be pruned."""
    linears, dense = _linears(model.layers[index]), served_dense(model.layers[index])
    return {
        name: module
        for name, module in linears.items()
        if name not in dense and not _reason(model, index, name, module, recipe)
    }


def _linears(layer: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def _reason(model: StreamedModel, index: int, name: str, module: nn.Linear, recipe: Recipe) -> str | None:
    """Why a linear has to stay dense, as far as no experiment is needed to tell."""
    width, full = module.in_features, model.layer_prefix(index) + name
    tied = model.model.all_tied_weights_keys
    if f"{full}.weight" in {*tied, *tied.values()}:
        return "its weights are another layer's, too"
    if not model.names.direct.get(f"{full}.weight", "").endswith(".weight"):
        return "its weights are stored as a part of others"
    if not model.names.is_found_compressed(full):
        return "transformers renames its weight, and would not find it compressed"
    if recipe.ignores(model.written_linear(index, name)):
        return IGNORED
    if width % IN_FEATURES_MULTIPLE:
        return f"its {width} in-features are not a multiple of {IN_FEATURES_MULTIPLE}"
    return None


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
    return [f"copied: {which}, not part of {kind} as transformers builds it."]
