"""What has come for the layers of a model in a reload of vLLM's, and what has not.

Proofs do not cover what a trainer sends, tensors that are no matrix, such as biases and norms, and files that lie
elsewhere than the folder whose names were checked: what is missing would be memory that nobody has written, or old.
"""

from collections import defaultdict
from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, get_numel_loaded

from ria_vllm.errors import RiaError
from ria_vllm.serve.load.completeness import dense_layers, stored_method


def check_arrived(path: str, layer: torch.nn.Module, info: Any) -> None:
    """Check, before a layer is packed in a reload, that each of its parameters was loaded as a whole. Linears and
    experts that are pruned know better what belongs to them, and check that themselves.

    Args:
        info: vLLM's `LayerReloadingInfo`.

    Raises:
        RiaError: something is missing.
    """
    if stored_method(layer) is not None:
        return
    numbers: dict[str, int] = defaultdict(int)
    seen: set[tuple[str, str]] = set()
    for name, arguments in info.loaded_weights:
        # Two names of the checkpoint may be one of the model's.
        others = {key: value for key, value in arguments.arguments.items() if not isinstance(value, torch.Tensor)}
        if (piece := (name, repr(others))) not in seen:
            seen.add(piece)
            parameter = layer._parameters.get(name)
            loader = layerwise._get_original_loader(layer._buffers[name] if parameter is None else parameter)
            numbers[name] += get_numel_loaded(loader, arguments)[0]
    for name, parameter in layer._parameters.items():
        if parameter is None or name in SKIP_TENSORS:
            continue  # what did not come keeps its old values
        wanted = _numbers_of(parameter)
        if isinstance(layer, VocabParallelEmbedding):
            wanted = min(wanted, 1)  # rows of padding are not in any file
        elif name.startswith(("w13_", "w2_")) and layer.moe_config.hidden_dim != layer.moe_config.hidden_dim_unpadded:
            wanted = min(wanted, 1)  # the same
        if numbers[name] < wanted:
            raise RiaError(
                f"vLLM's layer {path}: {numbers[name]} of the {wanted} numbers in its {name} came in this reload. A "
                "reload replaces all weights of each layer that it has any of: send all of them together."
            )


def _numbers_of(tensor: torch.Tensor) -> int:
    """How many numbers of a parameter are loaded; a parameter that takes none says so."""
    return getattr(tensor, "weight_loader_numel", tensor.numel())


def tied_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The embeddings and heads that get their weights from another layer in a reload that is about to end."""
    loaded = _loaded(model)
    found = []
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if not isinstance(getattr(layer, "quant_method", None), UnquantizedEmbeddingMethod) or info.load_numel > 0:
            continue
        weight = None if info.kernel_tensors is None else info.kernel_tensors[0].get("weight")
        if weight is not None and weight.data_ptr() in loaded:
            found.append(layer)
    return found


def left_out(model: torch.nn.Module, embeddings: bool = True, others: bool = False) -> list[str]:
    """Paths of the dense layers that lack something, and got nothing in a reload that is about to end.

    vLLM will give them what they had, and warns only. Weights that are tied to loaded ones are not among them.

    Args:
        embeddings: the model has embeddings and a head of its own.
        others: also layers of other kinds, such as norms. Not all of them are in all files.
    """
    dense, loaded, found = {path for path, _ in dense_layers(model, embeddings)}, _loaded(model), []
    for path, layer in model.named_modules():
        info = layerwise.get_layerwise_info(layer)
        if not info.can_load() or info.kernel_tensors is None or info.load_numel > 0:
            continue
        of_its_kind = path in dense or (others and not isinstance(layer, VocabParallelEmbedding))
        wanted = [name for name, tensor in info.restore_metadata[0].items() if _numbers_of(tensor)]
        tied = any(tensor.data_ptr() in loaded for tensor in info.kernel_tensors[0].values())
        if wanted and not tied and of_its_kind:
            found.append(path)
    return found


def _loaded(model: torch.nn.Module) -> set[int]:
    """Where the tensors are that layers have got, or will get when the reload ends."""
    loaded: set[int] = set()
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if not info.can_load() or info.load_numel > 0:
            tensors = layer._parameters if info.kernel_tensors is None else info.kernel_tensors[0]
            loaded |= {tensor.data_ptr() for tensor in tensors.values() if tensor is not None}
    return loaded - {0}  # what a kernel has packed is in no place
