"""The tensors of a trained model, whole and on the CPU, one at a time, wherever its trainer keeps them."""

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ria_vllm.errors import RiaError
from ria_vllm.placement import Origin, Placement, inside_adapters
from ria_vllm.training.masks import holder, origin_of

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def ready(model: nn.Module, like: str | Path) -> tuple[nn.Module, Origin]:
    """The model of transformers, which has no adapters and has all of its weights in memory, and its origin.

    Raises:
        RiaError: it has adapters; a weight is gone or not in memory; its origin is not known.
    """
    _refuse_adapters(model)
    base, origin = origin_of(model, like)
    for name in origin.placements:
        module, leaf = holder(base, name)
        if module._parameters.get(leaf) is None:
            raise RiaError(f"{name}: the model has no such parameter any more.")
    first = not dist.is_initialized() or dist.get_rank() == 0
    for name, tensor in base.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and tensor.is_meta and (first or isinstance(tensor, DTensor)):
            raise RiaError(
                f"{clean_name(name)}: its weights are not in memory (they are on the device meta). Load the model "
                "without it."
            )
    return base, origin


def _refuse_adapters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if _of_peft(module):
            raise RiaError(
                f"{name or type(model).__name__}: the model has adapters ({type(module).__name__}), which a "
                "compressed folder does not hold. Save them by `model.save_pretrained(ADAPTER)` and serve them beside "
                "the folder: `vllm serve OUT --enable-lora --lora-modules NAME=ADAPTER`. If kept weights were trained "
                "as well, save these from `model.unload()`."
            )


def has_adapters(model: nn.Module) -> bool:
    return any(map(_of_peft, model.modules()))


def own_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model without those of PEFT's adapters, under the names that they have without adapters."""
    if _of_peft(module):
        inside = inside_adapters(module)
        if inside is not module:
            yield from own_parameters(inside, prefix)
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield clean_name(prefix + name), parameter
    for name, child in module.named_children():
        yield from own_parameters(child, f"{prefix}{name}.")


def copied_modules(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Modules that PEFT has copied to train the copy (`modules_to_save`): the module in the model, and its copies."""
    for module in model.modules():
        if _of_peft(module) and {"original_module", "modules_to_save"} <= module._modules.keys():
            yield module.get_submodule("original_module"), module.get_submodule("modules_to_save")


def saved_biases(model: nn.Module) -> Iterator[nn.Parameter]:
    """The biases of the model that PEFT saves with an adapter, as `bias` in its settings says."""
    settings = getattr(model, "peft_config", None)  # PEFT puts it there, by the names of adapters
    which = {str(getattr(one, "bias", "none")) for one in settings.values()} if isinstance(settings, dict) else set()
    if "all" in which:
        yield from (parameter for name, parameter in own_parameters(model) if name.rpartition(".")[2] == "bias")
    if any(one.endswith("_only") for one in which):  # of the linears with adapters
        for module in model.modules():
            bias = getattr(inside_adapters(module), "bias", None) if _of_peft(module) else None
            if isinstance(bias, nn.Parameter):
                yield bias


def _of_peft(module: nn.Module) -> bool:
    return _has_peft(type(module).__mro__)


@functools.cache
def _has_peft(kinds: tuple[type, ...]) -> bool:
    return any(kind.__module__.split(".")[0] == "peft" for kind in kinds)


def clean_name(name: str) -> str:
    """A tensor's name without those of wrappers inside the model (torch.compile, activation checkpointing)."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


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
