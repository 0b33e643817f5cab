"""Which routed experts are pruned, and how the checkpoint describes them."""

from collections.abc import Iterable, Mapping

from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.layer_schema import Experts, Fold, Producer, Stacked
from ria_vllm.offline.model.architecture import text_config
from ria_vllm.offline.model.expert_files import ExpertFiles
from ria_vllm.offline.model.experts import DOWN
from ria_vllm.offline.model.streaming import StreamedModel
from ria_vllm.offline.model.topology import Topologies, Topology
from ria_vllm.offline.recipe import Recipe
from ria_vllm.sparse24 import IN_FEATURES_MULTIPLE

ROUTER = "chooses experts"


def plan_experts(
    model: StreamedModel, index: int, topology: Topology, recipe: Recipe, sensitive: Iterable[str]
) -> tuple[frozenset[str], dict[str, str]]:
    """What happens to the experts of layer `index`: those of a module are all pruned, or all stay dense.

    Args:
        sensitive: written names of linears that stay dense because pruning them would cost most quality.

    Returns:
        (paths of the experts that are pruned; written name of what stays dense -> why). Experts that stay dense count
        as one, under the name of their module.
    """
    sensitive = set(sensitive)
    reached = {group.experts for sublayer in topology.sublayers for stage in sublayer.stages for group in stage}
    pruned, dense = set(), {}
    for path, why in model.dense_experts[index].items():
        dense[model.layer_prefix(index) + path] = why
    for path, files in model.experts[index].items():
        dense |= dict.fromkeys(_routers(model, index, path), ROUTER)
        reason = _reason(model, files, path in reached, recipe, sensitive)
        if reason is None:
            pruned.add(path)
        else:
            dense[files.module] = reason
    return frozenset(pruned), dense


def widths_of_experts(model: StreamedModel, index: int, recipe: Recipe) -> dict[str, int]:
    """Written name -> in-features, of the linears of the first expert of each module that may be pruned.

    Those of the others are as wide.
    """
    found = {}
    for files in model.experts[index].values():
        if _reason(model, files, True, recipe, set()) is None:
            for kind in files.layout.kinds:
                found[files.linear(0, kind)] = files.layout.inner if kind == DOWN else files.layout.width
    return found


def check_alike(model: StreamedModel, pruned: Mapping[int, Iterable[str]]) -> None:
    """Check that config.json can describe the experts that are pruned: those of all layers under one name.

    Args:
        pruned: layer index -> paths of its experts that are pruned.

    Raises:
        RiaError: the experts of two layers differ in their number, for example.
    """
    first: dict[str, Experts] = {}
    for index, paths in pruned.items():
        for files in (model.experts[index][path] for path in sorted(paths)):
            found = _described(files, index)
            if first.setdefault(found.module, found) != found:
                raise RiaError(
                    f"{model.folder}: {files.module}: its {found.num_experts} experts are not stored like those of the "
                    f"layers before it, so config.json cannot describe both. Leave them dense: --ignore {files.module}"
                )


def experts_left_dense(dense: Mapping[str, str]) -> list[str]:
    """A warning about experts that stay dense, if there are any. `dense` is what `plan_experts` gives."""
    left = {name: why for name, why in dense.items() if why != ROUTER}
    if not left:
        return []
    name, why = next(iter(left.items()))
    more = f", and {len(left) - 1} more" if len(left) > 1 else ""
    return [f"the experts stay dense in {name}{more}: {why}."]


def describe_experts(
    model: StreamedModel, topologies: Topologies, pruned: Mapping[int, Iterable[str]]
) -> tuple[list[Experts], list[Fold]]:
    """What config.json says of the experts that are pruned: where they are, and that their down projections fold.

    Args:
        pruned: layer index -> paths of its experts that are pruned.
    """
    experts: list[Experts] = []
    folds: list[Fold] = []
    for index, paths in pruned.items():
        for path in sorted(paths):
            found = _described(model.experts[index][path], index)
            if found not in experts:
                experts.append(found)
            producers = [Producer(name=name) for kind, name in found.linears.items() if kind != "down"]
            fold = Fold(consumer=found.down, producers=producers, coupling="elementwise")
            if topologies.of(index).folds_experts(path) and fold not in folds:
                folds.append(fold)
    return experts, folds


def _reason(model: StreamedModel, files: ExpertFiles, reached: bool, recipe: Recipe, sensitive: set[str]) -> str | None:
    """Why the experts stay dense; None if they do not."""
    layout = files.layout
    if not reached:
        return "no tokens reached them in the run of a layer by which the others are described"
    if recipe.served and layout.weighted_inputs and text_config(model.config).num_experts_per_tok != 1:
        return "the router weights their inputs, which vLLM serves only with one expert for each token"
    named = [files.module, *files.linears, *(name.removesuffix(".weight") for name in files.sources), *files.sources]
    if any(map(recipe.ignores, named)):
        return "--ignore"
    if sensitive & set(files.linears):
        return "--skip-sensitive"
    for width in (layout.width, layout.inner):
        if recipe.served and width % IN_FEATURES_MULTIPLE:
            return f"their {width} in-features are not a multiple of {IN_FEATURES_MULTIPLE}"
        if recipe.pattern.structured and width % recipe.pattern.m:
            return f"their {width} in-features do not divide into groups of {recipe.pattern.m}"
    return None


def _routers(model: StreamedModel, index: int, path: str) -> list[str]:
    """The routers beside the experts at `path` that are not nn.Linear; the plan finds the others by itself."""
    block, layer = path.rpartition(".")[0], model.layers[index]
    experts = model.experts[index][path].layout.num_experts
    found = []
    for name, module in layer.get_submodule(block).named_children():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            continue
        if len(weight) == experts:
            found.append(model.names.linear(f"{model.layer_prefix(index)}{block + '.' if block else ''}{name}"))
    return found


def _described(files: ExpertFiles, index: int) -> Experts:
    def pattern(name: str) -> str:
        return name.replace(f".{index}.", ".{i}.", 1)

    layout = files.layout
    linears = {kind: pattern(f"{files.module}.{{e}}.{files.leaves[kind]}") for kind in layout.kinds}
    stacked = [
        Stacked(
            tensor=pattern(tensor),
            bias=pattern(files.biases[parameter]) if parameter in files.biases else None,
            linears=list(layout.parameters[parameter]),
            interleaved=layout.interleaved and len(layout.parameters[parameter]) > 1,
            transposed=files.transposed,
        )
        for parameter, tensor in files.stacked.items()
    ]
    return Experts(
        module=pattern(files.module), num_experts=layout.num_experts, gate=linears.get("gate"), up=linears["up"],
        down=linears["down"], stacked=stacked,
    )  # fmt: skip
