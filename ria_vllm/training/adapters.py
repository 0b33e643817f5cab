"""What others put into a model and around its modules: adapters of PEFT, and wrappers that change tensors' names."""

import functools
from collections.abc import Iterator

from torch import nn

from ria_vllm.checkpoint.placement import inside_adapters
from ria_vllm.errors import RiaError

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def clean_name(name: str) -> str:
    """A tensor's name without those of wrappers inside the model (torch.compile, activation checkpointing)."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model with adapters where a whole one is needed.

    Raises:
        RiaError: there is one; names its module.
    """
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
