"""What others put into a model and around its modules: adapters of PEFT, and wrappers that change tensors' names."""

import functools
from collections.abc import Set

from torch import nn

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
                "the folder: `vllm serve OUT --enable-lora --lora-modules NAME=ADAPTER`."
            )


def has_adapters(model: nn.Module) -> bool:
    return any(map(_of_peft, model.modules()))


def beside_adapters(model: nn.Module, changed: Set[int], pruned: Set[int]) -> list[str]:
    """Names of the parameters among `changed` (ids) that train, but are in no checkpoint of PEFT, or lose their zeros.

    In it are those of its layers, and of what it trains as a whole (`modules_to_save`); with `bias="all"` all biases,
    with "lora_only" those of its layers. A copy of a pruned linear (ids of weights: `pruned`) would be trained dense.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    saved = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for parameter in module.parameters()
    }
    configs = [config for module in model.modules() for config in (getattr(module, "peft_config", None) or {}).values()]
    biases = {getattr(config, "bias", None) for config in configs}
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            of_original = {id(parameter) for parameter in module.original_module.parameters()}
            if of_original & pruned:
                saved -= {id(parameter) for parameter in module.parameters()}
    return [
        clean_name(name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) in changed
        if id(parameter) not in saved or ".base_layer." in name
        if not (name.endswith("bias") and ("all" in biases or (".base_layer." in name and "lora_only" in biases)))
    ]


def _of_peft(module: nn.Module) -> bool:
    return _has_peft(type(module).__mro__)


@functools.cache
def _has_peft(kinds: tuple[type, ...]) -> bool:
    return any(kind.__module__.split(".")[0] == "peft" for kind in kinds)
