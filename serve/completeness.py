"""Whether the layers that stay dense got their weights. vLLM checks that of unquantized models only.

What a model's `load_weights` returns does not tell for all families. So every such weight, which vLLM leaves
uninitialized, is filled with one number before it is loaded; where it still is that number everywhere, nothing came.
"""

from collections.abc import Iterator

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from ria_vllm.errors import RiaError

# Exact in every dtype that weights have, and small: some models leave rows of a fused weight out, and never use them.
EMPTY = 3 * 2.0**-16


def dense_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(path of the layer, weight) of the linear layers that vLLM serves dense, those without storage left out."""
    for path, layer in model.named_modules():
        if isinstance(layer, LinearBase) and isinstance(layer.quant_method, UnquantizedLinearMethod):
            weight = getattr(layer, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.dtype.itemsize > 1 and weight.numel() and not weight.is_meta:
                yield path, weight.data


def empty_weights(model: torch.nn.Module) -> None:
    """Prepare `check_loaded`, before any weight is loaded."""
    for _, weight in dense_weights(model):
        weight.fill_(EMPTY)


def check_loaded(model: torch.nn.Module, where: str) -> None:
    """Check that each layer's weight was loaded, or a part of it.

    Raises:
        RiaError: names the first layer that got nothing.
    """
    for path, weight in dense_weights(model):
        if weight[(0,) * weight.dim()] == EMPTY and bool((weight == EMPTY).all()):
            raise RiaError(
                f"{where}: the weight of vLLM's layer {path} is in none of the weight files, though config.json "
                "describes it. Get all files of one model."
            )
