"""Which MoE layer of the built model serves which of the checkpoint's pruned experts.

vLLM's models load experts each in its own way, but all of them keep them in a `RoutedExperts` at the path to which the
names of the experts lead. `match_experts` finds it, and says who takes each tensor of an expert.
"""

from functools import partial

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from ria_vllm.errors import RiaError
from ria_vllm.format.layer_schema import Stacked
from ria_vllm.format.stacks import LayerExperts
from ria_vllm.serve.experts.dense import DenseExpertsMethod
from ria_vllm.serve.experts.method import Sparse24MoEMethod
from ria_vllm.serve.experts.stored import WAY_OUT
from ria_vllm.serve.load.model_paths import place_of
from ria_vllm.serve.load.stream import Taker
from ria_vllm.serve.model.config import RiaConfig


def match_experts(config: RiaConfig, model: torch.nn.Module) -> set[str]:
    """Give every MoE layer of a model that was just built the experts that belong to its path.

    Must be called before any weight is loaded.

    Returns:
        The names of the experts that our layers serve, or that belong to a part of the model that is elsewhere.

    Raises:
        RiaError: pruned experts that no layer serves, or that more than one layer might; or the reverse.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, RoutedExperts)}
    taken = {name for name, model_class in config.served_by.items() if model_class is not type(model)}
    served: set[str] = set()
    by_path: dict[str, str] = {}
    for name, experts in config.experts.items():
        if name in taken:
            continue
        paths = layers_of(model, experts, layers)
        if paths is None:
            served.add(name)
        elif len(paths) == 1 and paths[0] not in by_path:
            by_path[paths[0]] = name
            served.add(name)
        elif len(paths) == 1:
            raise RiaError(
                f"{config.where}: the experts {by_path[paths[0]]} and {name} both belong to vLLM's layer {paths[0]}. "
                + WAY_OUT
            )
        elif not config.served_by:  # a second model need not use all of them
            others = [path for path in layers if path not in by_path]
            raise RiaError(
                f"{config.where}: the pruned experts {name} would not be served: vLLM's {type(model).__name__} has "
                f"{'no layer' if not paths else 'the layers ' + ', '.join(paths)} at this path (left are: "
                f"{', '.join(others) or 'none'}). {WAY_OUT}"
            )
    for path, layer in layers.items():
        _serve(config, layer, by_path.get(path))
    return served


def layers_of(model: torch.nn.Module, experts: LayerExperts, layers: dict[str, RoutedExperts]) -> list[str] | None:
    """Paths of the MoE layers to which the names of these experts lead; None if they are elsewhere."""
    place = place_of(model, f"{experts.linear('up', 0)}.weight")
    if place is None:
        return None
    # The name may leave the modules before the layer, because vLLM puts it into a module of its own.
    if not any(part.isdigit() for part in place.path) and any(part.isdigit() for part in experts.name.split(".")):
        return []
    path = ".".join(place.path)
    return [name for name in layers if name == path or name.startswith(f"{path}.") or not path]


def _serve(config: RiaConfig, layer: RoutedExperts, name: str | None) -> None:
    """Make `layer` serve the experts `name`, or dense ones. It keeps its method if that does so already."""
    method = layer.quant_method
    if isinstance(method, Sparse24MoEMethod):
        if method.experts.name == name:
            return
    elif name is None:
        if isinstance(method, DenseExpertsMethod):
            method.check(layer.layer_name)
        return
    elif not isinstance(method, DenseExpertsMethod):  # vLLM's model gave the layer no quantization config
        raise RiaError(
            f"{config.where}: vLLM's layer {layer.layer_name} takes dense experts only, but {name} are pruned. "
            + WAY_OUT
        )
    for parameter in method.created:
        delattr(layer, parameter)
    new = config.experts_method(layer, name)
    if isinstance(new, DenseExpertsMethod):
        new.check(layer.layer_name)
    del layer.quant_method  # vLLM's own is a module; torch would not let another object take its place
    layer.quant_method = new
    new.create_weights(layer, **method.creation)


def takers(config: RiaConfig, model: torch.nn.Module) -> dict[str, Taker | None]:
    """Linear of an expert, or tensor with stacked biases -> who takes its tensors in place of the model.

    None for those that this process does not use: of another rank or pipeline stage, or of the model that a draft
    belongs to.
    """
    found: dict[str, Taker | None] = {}
    layers = {
        module.quant_method.experts.name: module
        for module in model.modules()
        if isinstance(module, RoutedExperts) and isinstance(module.quant_method, Sparse24MoEMethod)
    }
    for name, experts in config.experts.items():
        layer = layers.get(name)
        # Asked once, not per linear: vLLM's map may be on the GPU, and each look-up would wait for it.
        local = set() if layer is None else set(layer.expert_map_manager.get_local_expert_ids())
        for linear, kind, expert in experts.linears():
            give = layer.quant_method.loader.give if layer is not None and expert in local else None
            found[linear] = give and partial(give, layer, kind=kind, expert=expert)
        for bias, stacked in experts.biases.items():
            found[bias] = None if layer is None else _taker_of_biases(layer, bias, stacked)
    return found


def _taker_of_biases(layer: RoutedExperts, name: str, stacked: Stacked) -> Taker:
    loader = layer.quant_method.loader
    return lambda _, tensor: loader.give_biases(layer, name, tensor, stacked)
