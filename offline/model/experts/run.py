"""Runs routed experts one by one, with weights that are nowhere as a whole.

transformers lets the function that runs a layer's experts be replaced. Ours asks for the weights of one expert at a
time, and shows which tokens the router sends where.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ria_vllm.errors import RiaError
from ria_vllm.hf.experts_layout import DOWN, ExpertsLayout, experts_modules

IMPLEMENTATION = "ria_one_by_one"

# Tokens are padded to a multiple of this: the CPU's library keeps code for each shape that it has multiplied, which for
# every number of tokens would add up to more than the weights of a layer.
TOKENS_MULTIPLE = 64

# Expert's number -> linear ("gate", "up", "down") -> weight [out, in].
Weights = Callable[[int], Mapping[str, torch.Tensor]]

# Told what the experts read [tokens, width], and int [tokens, choices], to which of them each token goes. In Llama 4
# tokens are weighted, and each has one choice.
Watcher = Callable[[torch.Tensor, torch.Tensor], None]


def run_one_by_one(layer: nn.Module) -> None:
    """Let the experts of a decoder layer be run by `experts_forward`."""
    for path, layout in experts_modules(layer).items():
        experts = layer.get_submodule(path)
        experts.__dict__["layout"] = layout
        set_weights(experts, None)
        if layout.weighted_inputs:
            router = layer.get_submodule(path.rpartition(".")[0]).router
            router.register_forward_hook(partial(_keep_choices, experts))
            experts.forward = partial(_weighted_forward, experts)
        else:
            experts.config._experts_implementation = IMPLEMENTATION


def set_weights(experts: nn.Module, weights: Weights | None) -> None:
    """Where an experts module takes its weights from; None: its own parameters."""
    experts.__dict__["weights"] = weights


def set_watcher(experts: nn.Module, watcher: Watcher | None) -> None:
    """Who is told of the tokens that reach an experts module."""
    experts.__dict__["watcher"] = watcher


def own_weights(experts: nn.Module, expert: int, suffix: str = "") -> dict[str, torch.Tensor]:
    """Linear -> weight [out, in] of one expert in the module's own parameters, a view.

    Args:
        suffix: "_bias" for the biases [out] instead.
    """
    layout: ExpertsLayout = experts.layout
    found: dict[str, torch.Tensor] = {}
    for parameter in layout.parameters:
        found |= layout.parted(getattr(experts, parameter + suffix)[expert], parameter)
    return found


def biases(experts: nn.Module, expert: int) -> dict[str, torch.Tensor]:
    """Linear -> bias [out] of one expert; empty if the experts have none."""
    return own_weights(experts, expert, "_bias") if experts.layout.has_bias else {}


def inner(experts: nn.Module, expert: int, X: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What an expert's down projection reads, [tokens, inner], where the expert reads X [tokens, width]."""
    layout, bias = experts.layout, biases(experts, expert)
    outputs = [_linear(X, weights[kind], bias.get(kind)) for kind in layout.first]
    if layout.weighted_inputs:
        gate, up = outputs
        return up * experts.act_fn(gate)
    joined = layout.joined(outputs)
    return experts._apply_gate(joined) if layout.has_gate else experts.act_fn(joined)


def _output_of(
    experts: nn.Module, expert: int, X: torch.Tensor, rows: torch.Tensor, weights: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The output of an expert [rows, width] for some rows of X [tokens, width]."""
    padded = torch.cat([rows, rows.new_zeros(-len(rows) % TOKENS_MULTIPLE)])
    output = _linear(inner(experts, expert, X[padded], weights), weights[DOWN], biases(experts, expert).get(DOWN))
    return output[: len(rows)]


def _linear(X: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(X, weight.to(X.dtype), None if bias is None else bias.to(X.dtype))


def experts_forward(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """In the place of an experts module's own forward, with the same arguments and result."""
    watcher = experts.__dict__.get("watcher")
    if watcher is not None:
        watcher(hidden_states, top_k_index)
    weights_of = experts.__dict__.get("weights") or partial(own_weights, experts)
    out = torch.zeros_like(hidden_states)
    for expert in range(experts.layout.num_experts):
        token, choice = torch.where(top_k_index == expert)
        if len(token) == 0:
            continue
        computed = _output_of(experts, expert, hidden_states, token, weights_of(expert))
        # Some routers give weights in another dtype.
        weighted = computed * top_k_weights[token, choice, None]
        out.index_add_(0, token, weighted.to(out.dtype))
    return out


def _keep_choices(
    experts: nn.Module, router: Any, _: object, output: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A forward hook of Llama 4's router, which returns scores [tokens, experts], zeros for those not chosen.

    The block makes one weighted copy of all tokens for each column of the scores. With the chosen ones' columns alone
    [tokens, choices], it makes only those that an expert reads.
    """
    scores, logits = output
    chosen, experts.__dict__["choices"] = scores.topk(router.top_k, dim=1)
    return chosen, logits


def _weighted_forward(experts: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """In the place of the forward of Llama 4's experts: weighted tokens [choices * tokens, width] -> their outputs.

    Raises:
        RiaError: the block does not call them right after the router, with what `_keep_choices` leaves.
    """
    choices = experts.__dict__.pop("choices", None)
    if choices is None or choices.numel() != len(hidden_states):
        raise RiaError(
            f"{experts.layout.path}: this version of transformers gives a {type(experts).__name__} other tokens than "
            "those that its router has just chosen it for. Try another version."
        )
    choices = choices.T.reshape(-1, 1)
    return experts_forward(experts, hidden_states, choices, hidden_states.new_ones(choices.shape))


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
