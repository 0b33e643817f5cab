"""Rounds the inputs of pruned linears in transformers, where the checkpoint has `input_activations`.

So perplexity and training see what the served model computes. A linear multiplies with each token as its int8 or fp8
numbers and their scale give it back, in the dtype of the activations.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ria_vllm.errors import RiaError
from ria_vllm.format.token_rounding import round_tokens
from ria_vllm.format.weight_format import name_of
from ria_vllm.hf.experts_layout import ExpertsLayout, layout_of
from ria_vllm.hf.placement import inside_adapters

EXPERTS_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
INPUT_NAMES = ("input", "hidden_states")
"""What nn.Linear and experts call their input."""


def round_inputs(model: nn.Module, weights: Iterable[str], where: object, dtype: torch.dtype) -> None:
    """Let the linears and experts with these weights round each token of their inputs to `dtype`, see `round_tokens`.

    Saving the model does not keep this: it writes plain dense weights. A linear rounds what it is called with, and code
    that multiplies with its `weight` instead goes past that. Mamba's fused kernels do so in training; then the forward
    pass raises RiaError.

    Args:
        weights: names of parameters of the model.
        where: the checkpoint, for errors.

    Raises:
        RiaError: a weight belongs to a module of another kind.
    """
    experts: dict[str, set[str]] = {}
    mixers: dict[str, list[str]] = {}
    for name in sorted(set(weights)):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(partial(_round_first, dtype), with_kwargs=True)
            parent, _, child = path.rpartition(".")
            if hasattr(model.get_submodule(parent), "A_log"):
                mixers.setdefault(parent, []).append(child)
        elif leaf in EXPERTS_WEIGHTS and _form(module) is not None:
            experts.setdefault(path, set()).add(leaf)
        else:
            raise _not_rounded(where, name, module, dtype)
    for path, found in experts.items():
        module = model.get_submodule(path)
        form = _form(module)
        if form is None or found != set(form.parameters):
            raise _not_rounded(where, f"{path}.{min(found)}", module, dtype)
        _round_in_experts(module, form, dtype)
    for path, children in mixers.items():
        mixer = model.get_submodule(path)
        mixer.register_forward_pre_hook(partial(_expect_calls, children))
        mixer.register_forward_hook(partial(_check_calls, children, f"{where}: {path}"))


def _form(module: Any) -> ExpertsLayout | None:
    """The form of experts whose inputs can be rounded; None for any other module."""
    form = layout_of(module)
    return form if form is not None and (form.weighted_inputs or hasattr(module, "_apply_gate")) else None


def _round_first(
    dtype: torch.dtype, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward hook: the input, which is the first argument or has one of `INPUT_NAMES`."""
    module.rounded_its_input = True
    if args:
        return (round_tokens(args[0], dtype), *args[1:]), kwargs
    name = next((name for name in INPUT_NAMES if name in kwargs), None)
    if name is None:
        raise TypeError(f"{type(module).__name__}: the input is neither the first argument nor {INPUT_NAMES}")
    return args, kwargs | {name: round_tokens(kwargs[name], dtype)}


def _expect_calls(children: list[str], mixer: nn.Module, _: object) -> None:
    """A forward hook: none of the children has been called yet."""
    for child in children:
        inside_adapters(mixer.get_submodule(child)).rounded_its_input = False


def _check_calls(children: list[str], where: str, mixer: nn.Module, *_: object) -> None:
    """A forward hook: all of the children have been called."""
    for child in children:
        if not inside_adapters(mixer.get_submodule(child)).rounded_its_input:
            raise RiaError(
                f"{where}.{child}: {type(mixer).__name__} multiplies with its weight without calling it, so its "
                "input is not rounded, as config.json asks. In training, load the model without Mamba's "
                "kernels; or use the dense folder that `ria-vllm export` writes, which rounds no inputs."
            )


def _round_in_experts(experts: Any, form: ExpertsLayout, dtype: torch.dtype) -> None:
    """Round what gate and up read, and what down reads.

    `forward` is replaced because transformers' eager experts, and some other functions, compute the gate without
    calling `_apply_gate`.
    """
    experts.register_forward_pre_hook(partial(_round_first, dtype), with_kwargs=True)
    if form.weighted_inputs:
        experts.forward = partial(_weighted_forward, dtype, experts)
        return
    if form.has_gate:
        experts._apply_gate = partial(_rounded, dtype, experts._apply_gate)
    else:
        experts.act_fn = _RoundedFunction(experts.act_fn, dtype)
    experts.forward = partial(ALL_EXPERTS_FUNCTIONS["grouped_mm"], experts)


def _weighted_forward(dtype: torch.dtype, experts: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """What Llama 4's experts do with weighted tokens [experts * tokens, width], but what down reads is rounded."""
    X = hidden_states.view(experts.num_experts, -1, hidden_states.shape[-1])
    gate, up = torch.bmm(X, experts.gate_up_proj).chunk(2, dim=-1)
    return torch.bmm(round_tokens(up * experts.act_fn(gate), dtype), experts.down_proj).view_as(hidden_states)


def _rounded(dtype: torch.dtype, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return round_tokens(function(x), dtype)


class _RoundedFunction(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype):
        super().__init__()
        self.function, self.dtype = function, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return round_tokens(self.function(x), self.dtype)


def _not_rounded(where: object, name: str, module: nn.Module, dtype: torch.dtype) -> RiaError:
    return RiaError(
        f"{where}: {name} belongs to a {type(module).__name__}, whose input cannot be rounded to "
        f"{name_of(dtype)} in transformers, as config.json asks. `ria-vllm export` writes a dense folder, which rounds "
        "no inputs."
    )
