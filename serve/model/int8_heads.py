"""Which layers serve the heads and embeddings that a checkpoint stores in int8, and which of these are widened. So are
linears in int8 to which vLLM gives no method of ours."""

from functools import partial
from typing import Any

import torch
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from ria_vllm.compressed_tensors.packed_forms import Int8Rows, Translation
from ria_vllm.format.int8_rows import TENSORS
from ria_vllm.serve.linear.int8_rows import Int8EmbeddingMethod, TiedHeadMethod, misfit
from ria_vllm.serve.load.engine import EngineOptions
from ria_vllm.serve.load.load_report import say_widened, warn_of_inputs
from ria_vllm.serve.load.model_paths import destinations
from ria_vllm.serve.load.stream import Taker
from ria_vllm.serve.model.config import RiaConfig


def match_heads(
    config: RiaConfig, model: torch.nn.Module, embeddings: bool
) -> tuple[dict[str, Taker | None], Translation | None]:
    """Give each layer that serves a matrix in int8 the method for that, before anything is loaded.

    Args:
        embeddings: the model has embeddings and a head of its own. A draft may have its target's.

    Returns:
        Names of tensors -> who takes them in place of the model, which has no place for them. And the translation of
        those that no layer takes into plain weights, for the model; None: there are none.
    """
    takers: dict[str, Taker | None] = {}
    widened: dict[str, Int8Rows] = {}
    dtype = torch.get_default_dtype()
    reason = EngineOptions.current().needs_plain_head or (None if embeddings else "this model is a draft")
    for name in sorted(config.int8):
        places = destinations(model, name)
        if places is None:  # another rank of the pipeline has it
            takers |= {f"{name}.{part}": None for part in TENSORS}
            continue
        layer: Any = model.get_submodule(places[0][0]) if len(places) == 1 and not reason else None
        why = reason or _misfit(config, layer)
        if why is None:
            _serve(model, layer, name)
            takers |= {f"{name}.{part}": partial(layer.quant_method.take, layer) for part in TENSORS}
            continue
        widened[name] = Int8Rows(dtype)
        say_widened(name, dtype, why)
        if name in config.schema.int8_linears:
            scheme = config.scheme(name)
            warn_of_inputs(scheme.activations, f"{name} and others like it are widened", scheme.format)
    return takers, Translation(widened.get, lambda _: None) if widened else None


def _misfit(config: RiaConfig, layer: torch.nn.Module | None) -> str | None:
    """Why a layer cannot serve a matrix in int8, or None."""
    plain = type(getattr(layer, "quant_method", None)) is UnquantizedEmbeddingMethod
    if layer is None or not plain or config.scales_head:
        return "this rank has no layer that takes it as it is stored"
    if type(layer).forward not in (VocabParallelEmbedding.forward, ParallelLMHead.forward):
        return "the model does more with it than to look it up"
    return misfit(layer)


def _serve(model: torch.nn.Module, layer: VocabParallelEmbedding, name: str) -> None:
    """Replace vLLM's method of a layer, and that of a head that has its weight."""
    weight = layer.weight
    all_heads = [one for one in model.modules() if isinstance(one, ParallelLMHead)]
    heads = [one for one in all_heads if getattr(one, "weight", None) is weight]
    # Some models without a head multiply with the embedding itself.
    multiplies = bool(heads) or (not all_heads and get_pp_group().is_last_rank)
    method = Int8EmbeddingMethod(name, not isinstance(layer, ParallelLMHead), multiplies)
    for one in {layer, *heads}:
        del one.weight
        one.quant_method = method if one is layer else TiedHeadMethod(layer)
        one.use_fused_embedding = False
    method.create_weights(layer, weight)
