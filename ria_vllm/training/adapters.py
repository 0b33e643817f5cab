"""What others put into a model and around its modules: adapters of PEFT, and wrappers that change tensors' names."""

import functools

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


def _of_peft(module: nn.Module) -> bool:
    return _has_peft(type(module).__mro__)


@functools.cache
def _has_peft(kinds: tuple[type, ...]) -> bool:
    return any(kind.__module__.split(".")[0] == "peft" for kind in kinds)
