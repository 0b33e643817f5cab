"""Which of the built model's layers serves which of the checkpoint's linears.

vLLM hands its quantization config a prefix for every layer, and its authors write that string by hand: in some families
it is not the layer's path. While the model is built, `RiaConfig.get_quant_method` can only go by the prefix. Once the model
stands, `settle` goes by the paths and by the model's own rules for naming weights, gives layers that were misjudged their
right form, and makes sure that each pruned linear is served exactly once.
"""

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from ria_vllm.errors import RiaError
from ria_vllm.serve.linear import Created, Sparse24LinearMethod
from ria_vllm.serve.loading import ShardId

if TYPE_CHECKING:
    from ria_vllm.serve.config import RiaConfig

# Modules that vLLM puts where another pipeline stage, or nobody, has the real ones.
ELSEWHERE = ("PPMissingLayer", "StageMissingLayer")
# Names in an error; the others are counted.
NAMED = 5


@register_weight_loader_v2_supported_method
class ProvisionalDenseMethod(UnquantizedLinearMethod):
    """What a layer has whose prefix names no pruned linear, until `settle` has seen its path."""

    def create_weights(self, layer: LinearBase, *args: Any, **kwargs: Any) -> None:
        self.created = Created.by(super().create_weights, layer, *args, **kwargs)


def settle(config: "RiaConfig", model: torch.nn.Module) -> None:
    """Give every linear layer of a model that was just built the checkpoint's linears that belong to its path.

    Must be called before any weight is loaded. A second model that is built with the same config (the draft of a
    multi-token prediction) may use other tensors of the checkpoint, and need not use all.

    Raises:
        RiaError: a pruned linear that no layer serves, or more than one; a layer that is half dense.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LinearBase)}
    # A draft may call its layers as the target does; what the target serves is not the draft's.
    taken = {name for name, kind in config.served_by.items() if kind is not type(model)}
    found = parts_by_path(config, model, layers, taken) if config.stored is not None else {}
    placed = {name for parts in found.values() for name in parts} | taken
    served: Counter[str] = Counter()
    unquantized: dict[str, tuple[str, ...]] = {}
    for path, layer in layers.items():
        method = layer.quant_method
        sparse = isinstance(method, Sparse24LinearMethod)
        parts = found.get(path)
        if parts is None:
            # The model's rules do not lead here. A prefix that names linears which belong nowhere else still counts.
            parts = method.parts if sparse and not placed.intersection(method.parts) else ()
        wanted = bool(parts) and config.serves_sparse(path, parts)
        if not sparse and not isinstance(method, ProvisionalDenseMethod):
            if wanted:
                unquantized[path] = parts
            continue
        if wanted:
            if not sparse or method.parts != parts:
                replace_method(layer, Sparse24LinearMethod(config, path, parts))
            served.update(set(parts))
        elif sparse and config.stored is not None:
            replace_method(layer, UnquantizedLinearMethod())
        elif not sparse:
            layer.quant_method = UnquantizedLinearMethod()
    unserved = config.required - set(served) - set(config.served_by)
    elsewhere = {name for name in unserved if destinations(model, name) is None}
    if config.stored is not None:
        _check(config, model, served, unserved - elsewhere, unquantized)
    config.served_by |= dict.fromkeys(elsewhere | set(served), type(model))
    config.settled = True


def _check(
    config: "RiaConfig",
    model: torch.nn.Module,
    served: Counter[str],
    unserved: set[str],
    unquantized: dict[str, tuple[str, ...]],
) -> None:
    twice = [name for name, count in served.items() if count > 1]
    if twice:
        raise RiaError(f"{config.where}: {_some(twice)}: vLLM's {type(model).__name__} has more than one layer for it.")
    if config.settled:
        return  # a second model need not use all
    lost = sorted(unserved)
    if lost:
        dense = {part: path for path, parts in unquantized.items() for part in parts}
        if lost[0] in dense:
            reason = f"vLLM's layer {dense[lost[0]]} takes dense weights only"
        else:
            reason = f"no layer of vLLM's {type(model).__name__} takes it"
        raise RiaError(
            f"{config.where}: pruned linears that would not be served: {_some(lost)}. Of the first, {reason}. Compress "
            "the model again with these in --ignore, or make a dense folder with `ria-vllm export`."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def parts_by_path(
    config: "RiaConfig", model: torch.nn.Module, layers: dict[str, LinearBase], taken: set[str]
) -> dict[str, tuple[str, ...]]:
    """Path of a layer -> the checkpoint's linears that it is made of, in output order; layers without any are left out.

    Args:
        taken: linears that another model has.
    """
    shards: dict[str, dict[int, str]] = {}
    free = config.stored - taken
    for name in sorted(free):
        for path, shard in destinations(model, name) or ():
            if path in layers:
                shards.setdefault(path, {})[_position(shard)] = name
    found = {path: tuple(parts[i] for i in sorted(parts)) for path, parts in shards.items()}
    for path in layers:
        # Families whose loaders keep their rules to themselves list what they fuse in `packed_modules_mapping`.
        parts = config.parts_of(path)
        if path not in found and free.issuperset(parts):
            found[path] = parts
    return found


def destinations(model: torch.nn.Module, name: str) -> list[tuple[str, ShardId]] | None:
    """(path of a module, shard) of each place that vLLM loads the checkpoint's linear `name` to, by its own mappers.

    A module with a loader of its own applies its own mapper to what is left of the name, as vLLM's loaders do.

    Returns:
        Empty if the path leads nowhere; None if this process does not use the tensor: a mapper says so, or it belongs to
        a part of the model that is elsewhere.
    """
    module, path, rest = model, [], f"{name}.weight"
    shard: Any = None
    while True:
        mapper = getattr(module, "hf_to_vllm_mapper", None)
        if mapper is not None and hasattr(module, "load_weights"):
            mapped = mapper._map_name_with_shard(rest)
            if mapped is None:
                return None
            rest, new = mapped
            shard = shard if new is None else new
        # On to the next module that has a mapper, or to the end.
        while "." in rest:
            head, _, rest = rest.partition(".")
            path.append(head)
            child = module._modules.get(head)
            if child is None:
                return []
            if type(child).__name__ in ELSEWHERE:
                return None
            module = child
            if hasattr(module, "hf_to_vllm_mapper") and hasattr(module, "load_weights"):
                break
        else:
            break
    return [(".".join(path), one) for one in (shard if isinstance(shard, list) else [shard])]


def _position(shard: ShardId) -> int:
    """Where among a layer's outputs a shard begins."""
    first = shard[0] if isinstance(shard, tuple) else shard
    return first if isinstance(first, int) else {"q": 0, "k": 1, "v": 2}.get(first, 0)


def replace_method(layer: LinearBase, method: LinearMethodBase) -> None:
    """Give a layer that was created with another method, but not loaded yet, the parameters of `method`."""
    created: Created = layer.quant_method.created
    loader = created.remove(layer)
    if isinstance(layer.quant_method, Sparse24LinearMethod):
        layer.quant_method.config.report.expected -= 1
    layer.quant_method = method
    method.create_weights(layer, *created.args, **created.kwargs)
    if isinstance(method, Sparse24LinearMethod):
        method.adopt(layer, loader)
    elif loader is not None:
        layer.weight.weight_loader = loader
    layer.update_param_tp_status()
