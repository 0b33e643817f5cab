"""Rounds the inputs of pruned linears in transformers, where the checkpoint has `input_activations`.

So perplexity and training see what the served model computes. A linear multiplies with each token as its int8 numbers
and their scale give it back, in the dtype of the activations.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ria_vllm.errors import RiaError
from ria_vllm.token_rounding import round_tokens

EXPERTS_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


def round_inputs(model: nn.Module, weights: Iterable[str], where: object) -> None:
    """Let the linears and experts with these weights round each token of their inputs to int8.

    Saving the model does not keep this: it writes plain dense weights.

    Args:
        weights: names of parameters of the model.
        where: the checkpoint, for errors.

    Raises:
        RiaError: a weight belongs to a module of another kind.
    """
    experts: dict[str, set[str]] = {}
    for name in sorted(set(weights)):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_round_first, with_kwargs=True)
        elif leaf in EXPERTS_WEIGHTS and hasattr(module, "_apply_gate"):
            experts.setdefault(path, set()).add(leaf)
        else:
            raise _not_rounded(where, name, module)
    for path, found in experts.items():
        module = model.get_submodule(path)
        if found != {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}:
            raise _not_rounded(where, f"{path}.{min(found)}", module)
        _round_in_experts(module)


def _round_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward hook: the first argument, which is the input."""
    if args:
        return (round_tokens(args[0]), *args[1:]), kwargs
    name, x = next(iter(kwargs.items()))
    return args, kwargs | {name: round_tokens(x)}


def _round_in_experts(experts: Any) -> None:
    """Round what gate and up read, and what down reads. Not all of transformers' functions for experts let us."""
    experts.register_forward_pre_hook(_round_first, with_kwargs=True)
    if experts.has_gate:
        experts._apply_gate = partial(_rounded, experts._apply_gate)
    else:
        experts.act_fn = _RoundedFunction(experts.act_fn)
    experts.forward = partial(ALL_EXPERTS_FUNCTIONS["grouped_mm"], experts)


def _rounded(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return round_tokens(function(x))


class _RoundedFunction(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return round_tokens(self.function(x))


def _not_rounded(where: object, name: str, module: nn.Module) -> RiaError:
    return RiaError(
        f"{where}: {name} belongs to a {type(module).__name__}, whose input cannot be rounded to int8 in transformers, "
        "as config.json asks. `ria-vllm export` writes a dense folder, which rounds no inputs."
    )
