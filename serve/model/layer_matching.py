"""Which of the built model's layers serves which of the checkpoint's linears.

vLLM hands its quantization config a prefix for every layer. vLLM's authors write these strings by hand, and in some
families they are not the layers' paths. While a model is built, `RiaConfig.get_quant_method` has only the prefix. Once
the model is complete, `match_layers` goes by the paths and by the model's own rules for naming weights. It replaces the
method of each layer that was misjudged, and makes sure that each pruned linear is served exactly once.
"""

from collections import Counter

import torch
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod

from ria_vllm.errors import RiaError
from ria_vllm.serve.experts.names import WAY_OUT
from ria_vllm.serve.linear.method import ProvisionalDenseMethod, Sparse24LinearMethod
from ria_vllm.serve.linear.parameters import Creation
from ria_vllm.serve.load.model_paths import destinations
from ria_vllm.serve.load.shards import ShardId
from ria_vllm.serve.model.config import RiaConfig

# An error lists this many names and counts the others.
NAMES_IN_ERROR = 5


def match_layers(config: RiaConfig, model: torch.nn.Module) -> None:
    """Give every linear layer of a model that was just built the checkpoint's linears that belong to its path.

    Must be called before any weight is loaded. A second model that is built with the same config (the draft of a
    multi-token prediction) may use other tensors of the checkpoint, and need not use all of them. `model.ria_linears`
    then has what `linears_by_path` has found. Dense linears in int8 that no layer of ours serves join `config.int8`.

    Raises:
        RiaError: no layer serves a pruned linear, or more than one does; or a layer is partly dense.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts  # imports kernels for them

    layers = {path: module for path, module in model.named_modules() if isinstance(module, LinearBase)}
    of_experts: set[str] = set()
    if config.experts or any(isinstance(module, RoutedExperts) for module in model.modules()):
        from ria_vllm.serve.model.experts_matching import match_experts  # imports our kernels for them

        names = match_experts(config, model)
        of_experts = names | {linear for name in names for linear, _, _ in config.experts[name].linears()}
    # A draft may give its layers the target's paths, but the linears that the target serves are not the draft's.
    taken = {name for name, model_class in config.served_by.items() if model_class is not type(model)}
    found = linears_by_path(config, model, layers, taken)
    model.ria_linears = found
    placed = {name for linears in found.values() for name in linears} | taken
    served: Counter[str] = Counter()
    unquantized: dict[str, tuple[str, ...]] = {}
    for path, layer in layers.items():
        method = layer.quant_method
        sparse = isinstance(method, Sparse24LinearMethod)
        linears = found.get(path)
        if linears is None:
            # The model's rules do not lead here. The prefix still counts if its linears belong nowhere else.
            linears = method.names if sparse and not placed.intersection(method.names) else ()
        wanted = bool(linears) and config.serves_sparse(path, linears)
        if not sparse and not isinstance(method, ProvisionalDenseMethod):
            if wanted:
                unquantized[path] = linears
            continue
        if wanted:
            serve_sparse(config, path, layer, linears)
            served.update(set(linears))
        elif sparse:
            replace_method(layer, UnquantizedLinearMethod())
        else:
            layer.quant_method = UnquantizedLinearMethod()
    unserved = config.required - set(served) - of_experts - set(config.served_by)
    elsewhere = {name for name in unserved if destinations(model, name) is None}
    _check_all_served(config, model, served, unserved - elsewhere, unquantized)
    config.served_by |= dict.fromkeys(elsewhere | of_experts | set(served), type(model))
    config.int8 |= set(config.schema.int8_linears) - set(config.served_by)


def serve_sparse(config: RiaConfig, path: str, layer: LinearBase, linears: tuple[str, ...]) -> None:
    """Make `layer` serve `linears`. It keeps its method if that serves them already."""
    method = layer.quant_method
    model_loader = method.creation.model_loader(layer)
    if not isinstance(method, Sparse24LinearMethod) or method.names != linears:
        method = config.sparse_method(path, linears)
        replace_method(layer, method)
    method.finish_creation(layer, model_loader)


def replace_method(layer: LinearBase, method: LinearMethodBase) -> None:
    """Give a layer that was created with another method, but not loaded yet, the parameters of `method`."""
    creation: Creation = layer.quant_method.creation
    is_dense = isinstance(method, UnquantizedLinearMethod)
    model_loader = creation.model_loader(layer) if is_dense else None
    creation.undo(layer)
    layer.quant_method = method
    method.create_weights(layer, *creation.args, **creation.kwargs)
    if model_loader is not None:
        layer.weight.weight_loader = model_loader
    layer.update_param_tp_status()


def _check_all_served(
    config: RiaConfig,
    model: torch.nn.Module,
    served: Counter[str],
    unserved: set[str],
    unquantized: dict[str, tuple[str, ...]],
) -> None:
    twice = [name for name, count in served.items() if count > 1]
    if twice:
        raise RiaError(
            f"{config.where}: {_shorten(twice)}: vLLM's {type(model).__name__} has more than one layer for each."
        )
    if config.served_by:
        return  # a second model need not use all of them
    lost = sorted(unserved)
    if lost:
        dense = {linear: path for path, linears in unquantized.items() for linear in linears}
        if lost[0] in dense:
            reason = f"vLLM's layer {dense[lost[0]]} takes dense weights only"
        else:
            reason = f"no layer of vLLM's {type(model).__name__} takes it"
        way_out = "Compress the model again with these in --ignore, or make a dense folder with `ria-vllm export`."
        if config.compressed_tensors is not None:
            way_out = f"In a checkpoint of compressed-tensors, every quantized linear needs a layer in vLLM. {WAY_OUT}"
        raise RiaError(
            f"{config.where}: pruned linears that would not be served: {_shorten(lost)}. {lost[0]}: {reason}. {way_out}"
        )


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_IN_ERROR} more" if len(names) > NAMES_IN_ERROR else ""
    return ", ".join(names[:NAMES_IN_ERROR]) + more


def linears_by_path(
    config: RiaConfig, model: torch.nn.Module, layers: dict[str, LinearBase], taken: set[str]
) -> dict[str, tuple[str, ...]]:
    """Path of a layer -> the checkpoint's linears that it is made of, in output order. Layers without any are left out.

    Args:
        taken: linears that another model serves.
    """
    shards: dict[str, dict[int, str]] = {}
    free = config.stored - taken - config.expert_linears
    for name in sorted(free):
        for path, shard in destinations(model, name) or ():
            if path in layers:
                shards.setdefault(path, {})[_position(shard)] = name
    found = {path: tuple(linears[i] for i in sorted(linears)) for path, linears in shards.items()}
    placed = {name for linears in found.values() for name in linears}
    for path in layers:
        # Families whose rules are hidden in their loaders list what they fuse in `packed_modules_mapping`. As in
        # `destinations`, names may be relative to a child of the model.
        linears, relative = config.linears_of(path), config.linears_of(path.partition(".")[2])
        if path not in found and free.issuperset(linears):
            found[path] = linears
        elif path not in found and (free - placed).issuperset(relative):
            found[path] = relative
    return found


def _position(shard: ShardId) -> int:
    """The place of a shard among its layer's outputs."""
    first = shard[0] if isinstance(shard, tuple) else shard
    return first if isinstance(first, int) else {None: 0, "q": 0, "k": 1, "v": 2}.get(first, 0)
