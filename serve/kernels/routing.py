"""A layer's experts one after the other, for kernels that multiply with one matrix at a time."""

from collections.abc import Callable

import torch
from torch.nn import functional

from ria_vllm.serve.kernels.base import Activation

# To copy an expert's weights and to multiply with the copy moves them this many times: read, written, read.
_MOVES = 3


def activate(activation: Activation, gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2 I], the gates before the ups, or without a gate [..., I] -> [..., I], in the dtype that comes in."""
    if not activation.is_gated:
        return _function(activation, gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    limit = activation.limit
    if limit is not None:
        up = up.clamp(-limit, limit)
        if activation.name == "swiglustep":
            return _function(activation, gate).clamp(max=limit) * (up + activation.beta)
        gate = gate.clamp(max=limit)
    return _function(activation, gate) * (up + activation.beta)


def _function(activation: Activation, x: torch.Tensor) -> torch.Tensor:
    match activation.name:
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu2":
            return functional.relu(x).square()
    return x * torch.sigmoid(activation.alpha * x)


def two_products(
    activation: Activation, product: Callable[[torch.Tensor, int, int | torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor, int | torch.Tensor], torch.Tensor]:
    """What `sum_of_experts` takes as `compute`. The activation is computed in float32, and rounded to the rows' dtype.

    Args:
        product: (rows, 0 or 1, an expert as in `of_expert`) -> their product with its gate and up, or its down.
    """

    def compute(rows: torch.Tensor, expert: int | torch.Tensor) -> torch.Tensor:
        return product(activate(activation, product(rows, 0, expert).float()).to(rows.dtype), 1, expert)

    return compute


def of_expert(stacked: torch.Tensor, expert: int | torch.Tensor) -> torch.Tensor:
    """The part [...] of one expert in [E, ...]; a copy if its number is a tensor [1], which the host does not read."""
    if isinstance(expert, int):
        return stacked[expert]
    plain = stacked.view(torch.uint8) if stacked.itemsize == 1 else stacked  # torch cannot select every 8-bit dtype
    return plain.index_select(0, expert).squeeze(0).view(stacked.dtype)


def sum_of_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_experts: int,
    compute: Callable[[torch.Tensor, int | torch.Tensor], torch.Tensor],
    fixed_shapes: bool,
) -> torch.Tensor:
    """What `ExpertsKernel.apply` returns, whose arguments these are; float32 [T, H].

    Args:
        compute: (rows of x, an expert as in `of_expert`) -> what it makes of them, of the same shape.
        fixed_shapes: no shape depends on a value, so a CUDA graph can capture it. Of a few tokens, each is computed
            with copies of its experts' weights; of more, all experts compute all. Otherwise experts compute their own
            tokens alone, and the host waits once for how many these are.

    Raises:
        RuntimeError: an expert that does not exist.
    """
    ids = topk_ids.long()
    _check(ids, num_experts if expert_map is None else len(expert_map), "topk_ids")
    if expert_map is not None:
        ids = torch.where(ids < 0, ids, expert_map.long()[ids.clamp(min=0)])
        _check(ids, num_experts, "expert_map")
    y, top_k = torch.zeros(x.shape, dtype=torch.float32, device=x.device), ids.shape[1]
    if not fixed_shapes:
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten() + 1, minlength=num_experts + 1).tolist()
        shares = topk_weights.float().flatten()[order].split(counts)
        tokens = (order // top_k).split(counts)
        for expert in range(num_experts):
            if len(rows := tokens[expert + 1]):  # the first are of no expert
                y.index_add_(0, rows, compute(x[rows], expert).float() * shares[expert + 1][:, None])
    elif 0 < _MOVES * ids.numel() <= num_experts:
        for slot in range(top_k):
            numbers = ids[:, slot].clamp(min=0).split(1)
            result = torch.cat([compute(row, number) for row, number in zip(x.split(1), numbers)]).float()
            y = torch.where(ids[:, slot, None] < 0, y, y + result * topk_weights[:, slot, None])
    else:
        for expert in range(num_experts):
            chosen = ids == expert
            share = torch.where(chosen, topk_weights, torch.zeros_like(topk_weights)).sum(1, keepdim=True)
            y = torch.where(chosen.any(1, keepdim=True), y + compute(x, expert).float() * share, y)
    return y


def _check(ids: torch.Tensor, experts: int, name: str) -> None:
    """Check that all ids are less than `experts`, or -1. On a GPU, the check is part of what is captured."""
    message = f"ria::sparse24: {name} has an expert that does not exist"
    valid = ((ids >= -1) & (ids < experts)).all()
    if ids.device.type == "cpu":
        if not valid:
            raise RuntimeError(message)
    else:
        torch._assert_async(valid, message)
