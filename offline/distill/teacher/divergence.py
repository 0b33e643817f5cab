"""How far the student's predictions are from the teacher's, with gradients that are computed in the same pass."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

# Logits that are handled at a time: their float32 copies stay in a core's cache. GPUs need more to do at once.
BLOCK, GPU_BLOCK = 1 << 17, 1 << 26


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher, student) of each token in nats: float32 [tokens].

    It is computed in float32 whatever the dtype of the logits (from float64, in float64), and differentiable in the
    student's logits, once. What the teacher excludes (a logit of -inf) counts as nothing.

    Args:
        teacher, student: logits [tokens, vocabulary].
    """
    return _Divergence.apply(student, teacher)


class _Divergence(torch.autograd.Function):
    """Of softmax(teacher) and softmax(student), the gradient is their difference. Autograd would keep a tensor of the
    logits' size for each operation; here each block of rows is finished before the next is read."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        found = torch.empty(len(student), dtype=wide, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for rows in _blocks(student):
            logs, wanted = (torch.log_softmax(logits[rows].to(wide), -1) for logits in (student, teacher))
            probable = wanted.exp()
            found[rows] = torch.sub(wanted, logs).mul_(probable).sum(-1)
            if not bool(found[rows].isfinite().all()):  # a second pass only where something is excluded: it is slow
                terms = torch.where(probable == 0, 0.0, probable * (wanted - logs))  # NaN stays NaN
                found[rows] = terms.sum(-1)
            if gradient is not None:
                gradient[rows] = logs.exp_().sub_(probable)
        ctx.gradient = gradient
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factors: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None  # not to be alive longer than this
        if not bool((factors == 1).all()):
            for rows in _blocks(gradient):
                gradient[rows] = gradient[rows].to(factors.dtype).mul_(factors[rows, None])
        return gradient, None


def _blocks(logits: torch.Tensor) -> Iterator[slice]:
    block = BLOCK if logits.device.type == "cpu" else GPU_BLOCK
    step = max(1, block // logits.shape[-1])
    return (slice(first, first + step) for first in range(0, len(logits), step))


def in_chunks(
    function: Callable[[torch.Tensor, slice], torch.Tensor], hidden: torch.Tensor, chunk: int
) -> torch.Tensor:
    """The sum of `function(hidden[rows], rows)` over chunks of rows, of which only one is in memory at a time.

    The gradient of each chunk is computed at once, in the forward pass, so that nothing is computed twice.

    Args:
        function: -> a sum over the rows; differentiable in hidden states, and in nothing else.
        hidden: [tokens, hidden].
    """
    return _InChunks.apply(hidden, function, chunk)


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, function: Callable, chunk: int) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for first in range(0, len(hidden), chunk):
            rows = slice(first, first + chunk)
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                part = hidden[rows].detach().requires_grad_(ctx.needs_input_grad[0])
                value = function(part, rows)
                if ctx.needs_input_grad[0]:
                    gradient[rows] = torch.autograd.grad(value, part)[0]
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.saved_tensors[0] * factor.to(ctx.saved_tensors[0].dtype), None, None
