"""Whether the layers that stay dense got their weights. vLLM checks that of unquantized models only.

Covered are the weights of linear layers, of embeddings, of the head and of experts that vLLM serves dense: matrices in
its own unquantized classes. So are the biases of all linear layers, pruned ones included. Not covered are the head's
bias, layers of other classes, and what vLLM does not leave uninitialized, such as norms and the biases of experts.

Proofs do not cover biases, tensors that another program's folder lacks, layers that prove only what they hold
(`proving.proved.Given`), or anything if RIA_VLLM_PROOF=0.

What a model's `load_weights` returns does not tell for all families. So every such tensor, which vLLM leaves
uninitialized, is filled with one number before it is loaded; where it still is that number everywhere, nothing came.
"""

from collections.abc import Iterator

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from ria_vllm.errors import RiaError
from ria_vllm.format.int8_rows import SCALE

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
            dense = embeddings and (isinstance(layer.quant_method, UnquantizedEmbeddingMethod) or is_in_int8(layer))
        else:
            continue
        if dense:
            yield path, layer


def is_in_int8(layer: torch.nn.Module) -> bool:
    """Whether an embedding or head has an `Int8EmbeddingMethod`, which is not known here."""
    return getattr(layer.quant_method, "keeps_int8", False)


def dense_tensors(model: torch.nn.Module, embeddings: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """(what it is, tensor) of the weights of `dense_layers`, or of their scales if they are in int8, and of the biases
    of all linear layers."""
    found = [(path, layer, SCALE if is_in_int8(layer) else "weight") for path, layer in dense_layers(model, embeddings)]
    found += [(path, layer, "bias") for path, layer in model.named_modules() if isinstance(layer, LinearBase)]
    for path, layer, name in found:
        tensor = getattr(layer, name, None)
        if isinstance(tensor, torch.Tensor) and _is_stored(tensor):
            yield f"the {name} of vLLM's layer {path}", tensor.data


def first_rows(model: torch.nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(path, projection, its first row [experts of this rank, in]) of all dense experts.

    Whatever way a model loads a projection, it fills this row.
    """
    for path, layer in model.named_modules():
        if "w13_weight" not in layer._parameters:
            continue
        # Models without experts do not import it.
        from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

        w13, w2 = layer.w13_weight, layer.w2_weight
        if not isinstance(layer.quant_method, UnquantizedFusedMoEMethod) or not (_is_stored(w13) and _is_stored(w2)):
            continue
        if layer.moe_config.is_act_and_mul:
            yield path, "gate", w13.data[:, 0]
        yield path, "up", w13.data[:, w13.shape[1] // 2 if layer.moe_config.is_act_and_mul else 0]
        yield path, "down", w2.data[:, 0]


def _is_stored(tensor: torch.Tensor) -> bool:
    return tensor.dtype.itemsize > 1 and tensor.numel() > 0 and not tensor.is_meta


def empty_weights(model: torch.nn.Module, embeddings: bool = True) -> None:
    """Prepare `check_loaded`, before any weight is loaded."""
    for _, tensor in dense_tensors(model, embeddings):
        tensor.fill_(EMPTY)
    for *_, rows in first_rows(model):
        rows.fill_(EMPTY)


def check_loaded(model: torch.nn.Module, where: str, embeddings: bool = True) -> None:
    """Check that each tensor was loaded, or a part of it; of dense experts, each projection of each expert.

    Args:
        where: the model's folder or repository.

    Raises:
        RiaError: names the first one that got nothing.
    """
    for what, tensor in dense_tensors(model, embeddings):
        if tensor[(0,) * tensor.dim()] == EMPTY and bool((tensor == EMPTY).all()):
            raise _absent(what, where)
    for path, projection, rows in first_rows(model):
        if empty := (rows == EMPTY).all(1).nonzero().flatten().tolist():
            raise _absent(f"the {projection} projection of this rank's expert {empty[0]} of vLLM's layer {path}", where)


def _absent(what: str, where: str) -> RiaError:
    return RiaError(
        f"{where}: {what} is in none of the weight files, though config.json describes it. Get all files of one model."
    )
