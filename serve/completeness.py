"""Whether the layers that stay dense got their weights. vLLM checks that of unquantized models only.

Covered are the weights of linear layers, of embeddings and of the head that vLLM serves dense: matrices in its own
unquantized classes. Not covered are biases, norms, dense experts, and layers of other classes. A reload also compares
the names of all tensors, see `ria_vllm.serve.reload`.

What a model's `load_weights` returns does not tell for all families. So every such weight, which vLLM leaves
uninitialized, is filled with one number before it is loaded; where it still is that number everywhere, nothing came.
When weights are reloaded, vLLM itself counts what comes for each layer.
"""

from collections.abc import Iterator, Sequence

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from ria_vllm.errors import RiaError

# Exact in every dtype that weights have, and small: some models leave rows of a fused weight out, and never use them.
EMPTY = 3 * 2.0**-16


def dense_layers(model: torch.nn.Module, embeddings: bool = True) -> Iterator[tuple[str, torch.nn.Module]]:
    """(path, layer) of the layers that vLLM serves dense.

    Args:
        embeddings: and of embeddings and the head. A draft may have them from its target, after it was loaded.
    """
    for path, layer in model.named_modules():
        if isinstance(layer, LinearBase):
            dense = isinstance(layer.quant_method, UnquantizedLinearMethod)
        elif isinstance(layer, VocabParallelEmbedding):
            dense = embeddings and isinstance(layer.quant_method, UnquantizedEmbeddingMethod)
        else:
            continue
        if dense:
            yield path, layer


def dense_weights(model: torch.nn.Module, embeddings: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """(path of the layer, weight) of `dense_layers`, those without storage left out."""
    for path, layer in dense_layers(model, embeddings):
        weight = getattr(layer, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dtype.itemsize > 1 and weight.numel() and not weight.is_meta:
            yield path, weight.data


def empty_weights(model: torch.nn.Module, embeddings: bool = True) -> None:
    """Prepare `check_loaded`, before any weight is loaded."""
    for _, weight in dense_weights(model, embeddings):
        weight.fill_(EMPTY)


def check_loaded(model: torch.nn.Module, where: str, embeddings: bool = True) -> None:
    """Check that each layer's weight was loaded, or a part of it.

    Args:
        where: the model's folder or repository.

    Raises:
        RiaError: names the first layer that got nothing.
    """
    for path, weight in dense_weights(model, embeddings):
        if weight[(0,) * weight.dim()] == EMPTY and bool((weight == EMPTY).all()):
            raise _absent(path, where)


def check_reloaded(left_out: Sequence[str], where: str) -> None:
    """Check, once a reload from files has ended, that nothing was `left_out` of it.

    Raises:
        RiaError: names the first layer that got nothing, and still has its old weights, or dummies.
    """
    if left_out:
        raise RiaError(
            f"{where}: vLLM's layer {left_out[0]} got no weights in this reload and has its old ones, or dummies, "
            "while others are new. Start the server again, with all files of one model."
        )


def left_out(model: torch.nn.Module, embeddings: bool = True) -> list[str]:
    """Paths of the layers that got no weights in a reload that is about to end.

    vLLM will give them their old ones, and warns only. Weights that are tied to loaded ones are not among them.
    """
    loaded: set[int] = set()
    for module in model.modules():
        info = get_layerwise_info(module)
        if not info.can_load() or info.load_numel > 0:
            tensors = module._parameters if info.kernel_tensors is None else info.kernel_tensors[0]
            loaded |= {tensor.data_ptr() for tensor in tensors.values() if tensor is not None}
    left = []
    for path, layer in dense_layers(model, embeddings):
        info = get_layerwise_info(layer)
        if info.can_load() and info.kernel_tensors is not None and info.load_numel <= 0 < (info.load_numel_total or 0):
            weight = info.kernel_tensors[0].get("weight")
            place = 0 if weight is None else weight.data_ptr()  # 0, too, where a kernel has packed it
            if not place or place not in loaded:
                left.append(path)
    return left


def _absent(path: str, where: str) -> RiaError:
    return RiaError(
        f"{where}: the weight of vLLM's layer {path} is in none of the weight files, though config.json describes it. "
        "Get all files of one model."
    )
