"""The tensors of a trained model, whole and on the CPU, one at a time, wherever its trainer keeps them."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ria_vllm.errors import RiaError
from ria_vllm.hf.placement import Origin, Placement
from ria_vllm.training.adapters import clean_name, refuse_adapters
from ria_vllm.training.masks import holder, origin_of
from ria_vllm.training.ranks import is_first


def ready(model: nn.Module, like: str | Path) -> tuple[nn.Module, Origin]:
    """The model of transformers, which has no adapters and has all of its weights in memory, and its origin.

    Raises:
        RiaError: it has adapters; a weight is gone or not in memory; its origin is not known.
    """
    refuse_adapters(model)
    base, origin = origin_of(model, like)
    for name in origin.placements:
        module, leaf = holder(base, name)
        if module._parameters.get(leaf) is None:
            raise RiaError(f"{name}: the model has no such parameter any more.")
    first = is_first()
    for name, tensor in base.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and tensor.is_meta and (first or isinstance(tensor, DTensor)):
            raise RiaError(
                f"{clean_name(name)}: its weights are not in memory (they are on the device meta). Load the model "
                "without it."
            )
    return base, origin


def gathered(
    base: nn.Module, origin: Origin, first: bool
) -> Iterator[tuple[str, Placement | None, torch.Tensor | None]]:
    """Each tensor of the model: its name, the pruned linears in it, and the whole of it on the CPU (first rank only).

    Those without pruned linears come first. A tensor with several names is one object.
    """
    state = {clean_name(name): tensor for name, tensor in base.state_dict(keep_vars=True).items()}
    found: dict[int, torch.Tensor | None] = {}
    for name, tensor in state.items():
        if name not in origin.placements and isinstance(tensor, torch.Tensor):
            if id(tensor) not in found:
                found[id(tensor)] = whole(tensor, first)
            yield name, None, found[id(tensor)]
    for name, placement in origin.placements.items():
        module, leaf = holder(base, name)
        yield name, placement, whole(module.get_parameter(leaf), first)


def whole(tensor: torch.Tensor, first: bool) -> torch.Tensor | None:
    """All of a tensor on the CPU, on the first rank. If it is sharded, all ranks must call this."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()
    return tensor.cpu() if first else None


def own_share(tensor: torch.Tensor, sharded: DTensor) -> torch.Tensor:
    """This rank's share of a tensor that all ranks have whole, divided as `sharded` is."""
    mesh = sharded.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, sharded.placements, src_data_rank=None).to_local()
