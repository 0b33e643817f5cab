"""The masks of a model's pruned weights, as the checkpoint's bitmasks say (a kept weight may be zero)."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.format import permutation, sparse24
from ria_vllm.hf.placement import ORIGIN_ATTRIBUTE, Origin, inside_adapters


def mask_of(reader: Reader, name: str) -> torch.Tensor:
    """bool [out, in], True where a linear's weight is kept, columns in the model's own order.

    Raises:
        RiaError: the linear is damaged.
    """
    linear = reader.linear(name)
    mask = sparse24.mask_from_bitmask(linear.parts["bitmask"])
    p = linear.input_permutation
    return mask if p is None else mask[:, permutation.invert(p).long()]


def origin_of(model: nn.Module, like: str | Path | None) -> tuple[nn.Module, Origin]:
    """The model of transformers inside what wraps it (PEFT, DDP, torch.compile), and where its pruned linears are.

    Args:
        like: the compressed folder, for a model that was loaded from a dense one, such as a trainer's checkpoint. It is
            loaded a second time, to see where transformers puts its linears.

    Raises:
        RiaError: the model was not loaded from a compressed folder, and `like` is None or not such a folder.
    """
    for module in model.modules():
        origin = vars(module).get(ORIGIN_ATTRIBUTE)  # not getattr, which wrappers pass on
        if isinstance(origin, Origin):
            return module, origin
    if like is None:
        raise RiaError(
            f"{type(model).__name__}: not loaded from a folder that `ria-vllm compress` wrote, so its masks are not "
            "known. Load that folder by `from_pretrained` after `import ria_vllm`, or give the folder as `like`."
        )
    base = _pretrained(model)
    found = type(base).from_pretrained(like, dtype=next(base.parameters()).dtype)
    origin = getattr(found, ORIGIN_ATTRIBUTE, None)
    if not isinstance(origin, Origin):
        raise RiaError(f"{like}: not a folder that `ria-vllm compress` wrote.")
    return base, origin


def holder(base: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the parameter `name`, also where PEFT has put an adapter around it; the name in the module.

    Raises:
        RiaError: there is none.
    """
    path, _, leaf = name.rpartition(".")
    module: Any = base
    for part in path.split(".") if path else ():
        module = inside_adapters(module)
        module = getattr(module, part, None)
    module = inside_adapters(module)
    if not isinstance(module, nn.Module):
        raise RiaError(f"{name}: the model has no such parameter any more. Keep all modules that it was loaded with.")
    return module, leaf


def _pretrained(model: nn.Module) -> Any:
    from transformers import PreTrainedModel

    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise RiaError(f"{type(model).__name__}: not a model of transformers.")
    return found
