"""The checkpoint's tensors on their way into vLLM's model.

vLLM's models may rename, fuse or rearrange them by rules of their own. Whether each layer then has what the files say
shows when it is proved, see `ria_vllm.serve.proving.layers`.
"""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch
from vllm.model_executor import model_loader

from ria_vllm.errors import RiaError
from ria_vllm.format.proofs import PROOF_SUFFIX

# Scales of an fp8 key-value cache. vLLM drops them with a warning, unless the model's config says that it has some.
CACHE_SCALE = re.compile(r"(.*\.)?([qkv]_(scale|zero_point)|(kv|prob|output)_scale|q\.scale|[kv]_cache\.scale)")

# By how the names of a linear's tensors end: those that store its weight, in any form that a layer loads.
WEIGHT_PARTS = ("weight", "compressed", "bitmask", "weight_scale", "integers")

# Other tensors of a pruned or quantized linear. `shape` repeats what the bitmask says. `input_permutation` was read
# before, but vLLM streams every safetensors file of a folder without an index. Activations are not rounded, or get a
# scale for each token, so none from the checkpoint is needed.
NOT_SERVED = ("shape", "input_permutation", "input_scale", "input_zero_point")

# Where vLLM reads files.
LOADERS = Path(model_loader.__file__).parent

Taker = Callable[[str, torch.Tensor], None]
"""Loads a tensor, whose last part of the name comes first, in place of the model."""

Weights = Iterable[tuple[str, torch.Tensor]]
"""Names and tensors, as `model.load_weights` takes them."""


def are_files(weights: Weights) -> bool:
    """Whether they are what a loader of vLLM reads from files, and not what somebody sends, perhaps lazily, too."""
    return inspect.isgenerator(weights) and Path(weights.gi_code.co_filename).is_relative_to(LOADERS)


def once(weights: Weights, seen: set[str], from_files: bool) -> Weights:
    """The same weights, each of which comes once.

    Args:
        seen: the names of those that have come; others are added.

    Raises:
        RiaError: there is a second tensor of the same name, which would replace the first, or be dropped by vLLM.
    """
    for name, tensor in weights:
        if name in seen and from_files:
            raise RiaError(
                f"{name} is in two of the weight files that vLLM loads. Remove the files that do not belong to the "
                "model, or get all files of one run."
            )
        if name in seen:
            raise RiaError(f"{name} was sent twice in one reload, and only one would count. Send it once.")
        seen.add(name)
        yield name, tensor


def without_proofs(weights: Weights, proofs: dict[str, torch.Tensor]) -> Weights:
    """The same weights but proofs, which are kept: matrix -> its proof, on the CPU."""
    for name, tensor in weights:
        if name.endswith(PROOF_SUFFIX):
            proofs[name.rpartition(".")[0]] = tensor.to("cpu", copy=True)
        else:
            yield name, tensor


def left_to_the_model(
    weights: Weights, takers: Mapping[str, Taker | None], forms: Mapping[str, Collection[str]]
) -> Weights:
    """The same weights but those that somebody takes in place of the model, and what our layers do not need.

    Args:
        takers: linears, or whole names of tensors -> who takes their tensors; None if nobody here needs them.
        forms: linears of our layers -> how the names of the tensors that store their weights end.

    Raises:
        RiaError: a linear is stored in another form, or a tensor would be dropped.
    """
    for name, tensor in weights:
        if CACHE_SCALE.fullmatch(name):
            raise RiaError(
                f"{name}: scales of an fp8 KV cache are not served. Leave them out: the cache then has the model's "
                "dtype, or scales of 1 with --kv-cache-dtype fp8."
            )
        module, _, part = name.rpartition(".")
        if part in NOT_SERVED and (module in takers or module in forms):
            continue
        if module in takers or name in takers:
            take = takers[name] if name in takers else takers[module]
            if take is not None:
                take(part, tensor)
            continue
        if module in forms and part in WEIGHT_PARTS and part not in forms[module]:
            # Some of vLLM's models drop what they have no place for, and the layer would keep its old weights.
            raise RiaError(
                f"{name}: this server has the linear stored as {', '.join(forms[module])}. Send these tensors, as the "
                "folder that it serves has them, or start a server of the new weights."
            )
        yield name, tensor
