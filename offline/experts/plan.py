"""Which routed experts are pruned, and how the checkpoint describes them."""

from collections.abc import Iterable, Mapping

from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.format.layer_schema import Experts, Fold, Producer, Stacked
from ria_vllm.format.sparse24 import IN_FEATURES_MULTIPLE
from ria_vllm.offline.model.experts.files import ExpertFiles
from ria_vllm.offline.model.run.architecture import text_config
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.model.topology import Topologies, Topology
from ria_vllm.offline.recipe import Recipe

ROUTER = "chooses experts"


def plan_experts(
    model: StreamedModel, index: int, topology: Topology, recipe: Recipe, reasons: Mapping[str, str]
) -> tuple[frozenset[str], dict[str, str]]:
    """What happens to the experts of layer `index`: those of a module are all pruned, or all stay dense.

    Args:
        reasons: path of experts that stay dense -> why.

    Returns:
        (paths of the experts that are pruned; written name of what stays dense -> why). Experts that stay dense count
        as one, under the name of their module.
    """
    reached = {group.experts for sublayer in topology.sublayers for stage in sublayer.stages for group in stage}
    dense = {model.layer_prefix(index) + path: why for path, why in model.dense_experts[index].items()}
    pruned = set()
    for path, files in model.experts[index].items():
        dense |= dict.fromkeys(_routers(model, index, path), ROUTER)
        reason = _reason(model, files, recipe) or reasons.get(path)
        if path not in reached:
            reason = "no tokens reached them in the run of a layer by which the others are described"
        if reason is None:
            pruned.add(path)
        else:
            dense[files.module] = reason
    return frozenset(pruned), dense


def widths_of_experts(model: StreamedModel, index: int, recipe: Recipe) -> dict[str, int]:
    """Written name -> in-features, of the linears of the first expert of each module that may be pruned.

    Those of the others are as wide.
    """
    able = experts_to_prune(model, index, recipe).values()
    return {files.linear(0, kind): files.layout.shape(kind)[1] for files in able for kind in files.layout.kinds}


def experts_to_prune(model: StreamedModel, index: int, recipe: Recipe) -> dict[str, ExpertFiles]:
    """Path -> files, of the experts of layer `index` that may be pruned."""
    return {path: files for path, files in model.experts[index].items() if _reason(model, files, recipe) is None}


def experts_left_dense(dense: Mapping[str, str]) -> list[str]:
    """A warning about experts that stay dense, if there are any. `dense` is what `plan_experts` gives."""
    left = {name: why for name, why in dense.items() if why != ROUTER}
    more = f", and {len(left) - 1} more" if len(left) > 1 else ""
    return [f"the experts stay dense in {name}{more}: {why}." for name, why in list(left.items())[:1]]


def describe_experts(model: StreamedModel, pruned: Mapping[int, Iterable[str]]) -> list[Experts]:
    """What config.json says of the experts that are pruned: those of all layers under one name.

    Args:
        pruned: layer index -> paths of its experts that are pruned.

    Raises:
        RiaError: the experts of two layers differ in their number, for example.
    """
    found: dict[str, Experts] = {}
    for index, paths in pruned.items():
        for files in (model.experts[index][path] for path in sorted(paths)):
            described = _described(files, index)
            if found.setdefault(described.module, described) != described:
                raise RiaError(
                    f"{model.folder}: {files.module}: its {described.num_experts} experts are not stored like those of "
                    f"the layers before it, so config.json cannot describe both. Leave them dense: --ignore "
                    f"{files.module}"
                )
    return list(found.values())


def folds_of_experts(model: StreamedModel, topologies: Topologies, pruned: Mapping[int, Iterable[str]]) -> list[Fold]:
    """The folds of the down projections of experts that are pruned.

    Args:
        pruned: layer index -> paths of its experts that are pruned.
    """
    folds: list[Fold] = []
    for index, paths in pruned.items():
        for path in (path for path in sorted(paths) if topologies.of(index).folds_experts(path)):
            *first, down = _described(model.experts[index][path], index).linears.values()
            fold = Fold(consumer=down, producers=[Producer(name=name) for name in first], coupling="elementwise")
            if fold not in folds:
                folds.append(fold)
    return folds


def _reason(model: StreamedModel, files: ExpertFiles, recipe: Recipe) -> str | None:
    """Why the experts have to stay dense, as far as no experiment is needed to tell; None if they do not."""
    layout = files.layout
    if layout.weighted_inputs and text_config(model.config).num_experts_per_tok != 1:
        return "the router weights their inputs, which vLLM serves only with one expert for each token"
    named = [files.module, *files.linears, *(name.removesuffix(".weight") for name in files.sources), *files.sources]
    if any(map(recipe.ignores, named)):
        return "--ignore"
    for width in (layout.width, layout.inner):
        if width % IN_FEATURES_MULTIPLE:
            return f"their {width} in-features are not a multiple of {IN_FEATURES_MULTIPLE}"
    return None


def _routers(model: StreamedModel, index: int, path: str) -> list[str]:
    """The routers beside the experts at `path` that are not nn.Linear; the plan finds the others by itself."""
    block = path.rpartition(".")[0]
    prefix = model.layer_prefix(index) + (f"{block}." if block else "")
    return [
        model.names.linear(prefix + name)
        for name, module in model.layers[index].get_submodule(block).named_children()
        if not isinstance(module, nn.Linear)
        and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and weight.dim() == 2
        and len(weight) == model.experts[index][path].layout.num_experts
    ]


def _described(files: ExpertFiles, index: int) -> Experts:
    def pattern(name: str) -> str:
        return name.replace(f".{index}.", ".{i}.", 1)

    layout = files.layout
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
    linears = {kind: pattern(f"{files.module}.{{e}}.{files.leaves[kind]}") for kind in layout.kinds}
    return Experts(module=pattern(files.module), num_experts=layout.num_experts, stacked=stacked, **linears)
