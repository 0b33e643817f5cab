"""Buffers that no file holds, such as rotary frequencies and embedding scales: the model computes them itself."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ria_vllm.errors import RiaError


def compute_buffers(
    model: PreTrainedModel, names: Sequence[str], device: torch.device, by_others: bool, folder: Path
) -> None:
    """Let the model compute these buffers.

    Args:
        names: of the buffers; they may be on the meta device.
        by_others: modules around the one that has a buffer may compute it, as Falcon-H1's decoder does for its layers.
            No parameter in them may be loaded yet.
        folder: for the error.

    Raises:
        RiaError: the model leaves a buffer as it is.
    """
    for name in names:
        owner, _, leaf = name.rpartition(".")
        buffers = model.get_submodule(owner)._buffers
        buffers[leaf] = _unset(torch.empty_like(buffers[leaf], device=device))
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
        _initialise(model, owner)
    for name in names:
        path = name.rpartition(".")[0]
        while by_others and path and _is_unset(model.get_buffer(name)):
            path = path.rpartition(".")[0]
            _initialise(model, path)
        if _is_unset(model.get_buffer(name)):
            raise RiaError(
                f"{folder}: {type(model).__name__} has a buffer {name} that is in no file, and this version of "
                "transformers does not compute it. Another version may."
            )


def _initialise(model: PreTrainedModel, path: str) -> None:
    """Initialise one module; the innermost PreTrainedModel that it is or lies in knows how."""
    around = path
    while not isinstance(model.get_submodule(around), PreTrainedModel):
        around = around.rpartition(".")[0]
    model.get_submodule(around)._init_weights(model.get_submodule(path))


def _unset(buffer: torch.Tensor) -> torch.Tensor:
    """`buffer`, filled with what no model computes, if its dtype has such a value."""
    if buffer.is_floating_point():
        return buffer.fill_(math.nan)
    return buffer.zero_() if buffer.dtype == torch.bool else buffer.fill_(torch.iinfo(buffer.dtype).min)


def _is_unset(buffer: torch.Tensor) -> bool:
    if buffer.dtype == torch.bool or not buffer.numel():
        return False
    return bool((buffer.isnan() if buffer.is_floating_point() else buffer == torch.iinfo(buffer.dtype).min).any())
