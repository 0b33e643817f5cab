"""The checkpoint's tensors on their way into vLLM's model.

vLLM's models may rename, fuse or rearrange them by rules of their own. Whether each layer then has what the files say
shows when it is proved, see `ria_vllm.serve.proving.layers`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping

import torch

from ria_vllm.errors import RiaError

# Scales of an fp8 key-value cache. vLLM drops them with a warning, unless the model's config says that it has some.
CACHE_SCALE = re.compile(r"(.*\.)?([qkv]_(scale|zero_point)|(kv|prob|output)_scale|q\.scale|[kv]_cache\.scale)")

# Other tensors of a pruned or quantized linear. `shape` repeats what the bitmask says. `input_permutation` was read
# before, but vLLM streams every safetensors file of a folder without an index. Activations are not rounded, or get a
# scale for each token, so none from the checkpoint is needed.
NOT_SERVED = ("shape", "input_permutation", "input_scale", "input_zero_point")

Taker = Callable[[str, torch.Tensor], None]
"""Loads a tensor, whose last part of the name comes first, in place of the model."""

Weights = Iterable[tuple[str, torch.Tensor]]
"""Names and tensors, as `model.load_weights` takes them."""


def once(weights: Weights) -> Weights:
    """The same weights, each of which comes once.

    Raises:
        RiaError: there is a second tensor of the same name, which would replace the first, or be dropped by vLLM.
    """
    seen: set[str] = set()
    for name, tensor in weights:
        if name in seen:
            raise RiaError(
                f"{name} is in two of the weight files that vLLM loads. Remove the files that do not belong to the "
                "model, or get all files of one run."
            )
        seen.add(name)
        yield name, tensor


def left_to_the_model(weights: Weights, takers: Mapping[str, Taker | None], ours: Collection[str]) -> Weights:
    """The same weights but those that somebody takes in place of the model, and what our layers do not need.

    Args:
        takers: linears, or whole names of tensors -> who takes their tensors; None if nobody here needs them.
        ours: the linears of our layers.

    Raises:
        RiaError: a tensor would be dropped.
    """
    for name, tensor in weights:
        if CACHE_SCALE.fullmatch(name):
            raise RiaError(
                f"{name}: scales of an fp8 KV cache are not served. Leave them out: the cache then has the model's "
                "dtype, or scales of 1 with --kv-cache-dtype fp8."
            )
        module, _, part = name.rpartition(".")
        if part in NOT_SERVED and (module in takers or module in ours):
            continue
        if module in takers or name in takers:
            take = takers[name] if name in takers else takers[module]
            if take is not None:
                take(part, tensor)
            continue
        yield name, tensor
