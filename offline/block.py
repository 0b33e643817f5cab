"""Block-wise reconstruction: train the weights that stay so that a whole component gives what the dense one gave.

A component is attention or MLP of one decoder layer with its residual connection, fed by the pruned model before it.
(See "A free lunch in LLM compression: revisiting retraining after pruning", arXiv 2510.14444.)
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from ria_vllm.errors import RiaError


def train_block(
    forward: Callable[[torch.Tensor], torch.Tensor],
    params: Mapping[str, torch.nn.Parameter],
    masks: Mapping[str, torch.Tensor],
    inputs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    passes: int = 8,
    lr: float = 1e-3,
    seed: int = 0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> list[float]:
    """Masked Adam under a cosine schedule, one step a micro-batch, in bf16 autocast over float32 parameters.

    A token's loss is its squared error over its own squared norm: in a plain mean square a few tokens with a thousand
    times the others' norm would be all that is learned.

    Args:
        forward: [..., hidden] -> [..., hidden], the residual stream after the component; reads `params`.
        params: what is trained, float32, changed in place.
        masks: bool, shaped as the parameter of that name, True = may change; a parameter without one is free.
        inputs, targets: micro-batches of one device and count; sequences that load an item when asked serve as well.
        seed: of the order in which micro-batches come.

    Returns:
        The mean loss of every pass.

    Raises:
        RiaError: parameters that are not float32, micro-batches that do not pair up, or a loss that is not finite.
    """
    if len(inputs) != len(targets) or not len(inputs):
        raise RiaError(f"{len(inputs)} inputs and {len(targets)} targets: block training needs as many of both, and some")
    if wrong := [name for name, p in params.items() if p.dtype != torch.float32]:
        raise RiaError(f"{wrong[0]} is {params[wrong[0]].dtype}: block training needs float32 parameters")
    optimizer = torch.optim.Adam(params.values(), lr=lr, betas=betas)
    order = torch.Generator().manual_seed(seed)
    steps = passes * len(inputs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    trainable = {name: p.requires_grad for name, p in params.items()}
    for p in params.values():
        p.requires_grad_(True)
    losses = []
    try:
        for _ in range(passes):
            total = 0.0
            for i in torch.randperm(len(inputs), generator=order).tolist():
                loss = _relative_error(forward, inputs[i], targets[i])
                loss.backward()
                for name, keep in masks.items():
                    # A gradient that is always zero leaves Adam's moments, and so the pruned weight, at zero.
                    params[name].grad.mul_(keep)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total += loss.item()
            losses.append(total / len(inputs))
            if not math.isfinite(losses[-1]):
                raise RiaError(f"block training diverged (loss {losses[-1]} in pass {len(losses)}); try a smaller lr")
    finally:
        for name, p in params.items():
            p.requires_grad_(trainable[name])
            p.grad = None
    return losses


def _relative_error(forward: Callable, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with torch.autocast(inputs.device.type, torch.bfloat16):
        outputs = forward(inputs.float())
    targets = targets.float()
    return ((outputs.float() - targets).square().sum(-1) / targets.square().sum(-1).clamp(min=1e-12)).mean()
