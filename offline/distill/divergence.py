"""How far the student's predictions are from the teacher's, with a gradient that is computed in the same pass."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

# Logits that are handled at a time: their float32 copies stay in a core's cache. GPUs need more to do at once.
BLOCK, GPU_BLOCK = 1 << 17, 1 << 26


@dataclass(frozen=True)
class Top:
    """A teacher's most probable tokens: int64 and float32 [tokens, k]; their logarithmic probabilities at the
    temperature of the loss, and the probability of all others is what they leave."""

    tokens: torch.Tensor
    logs: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, k: int, temperature: float) -> "Top":
        """The `k` most probable, from logits [tokens, vocabulary]."""
        logs = torch.log_softmax(logits.float() / temperature, -1)
        values, tokens = logs.topk(min(k, logits.shape[-1]), dim=-1)
        return cls(tokens, values)

    def __getitem__(self, rows: slice) -> "Top":
        return Top(self.tokens[rows], self.logs[rows])


def divergence(teacher: torch.Tensor | Top, student: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher, student) of each token in nats, times the square of the temperature: float32 [tokens].

    It is computed in float32 whatever the dtype of the logits (from float64, in float64), and differentiable in the
    student's logits, once. What the teacher excludes (a logit of -inf) counts as nothing.

    Args:
        teacher: logits [tokens, vocabulary]; or the most probable tokens, and all others are compared as one.
        student: logits [tokens, vocabulary].
    """
    return _Divergence.apply(student, teacher, temperature)


class _Divergence(torch.autograd.Function):
    """Of softmax(teacher) and softmax(student), the gradient is their difference. Autograd would keep a tensor of the
    logits' size for each operation; here each block of rows is finished before the next is read."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor | Top, temperature: float) -> torch.Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        found = torch.empty(len(student), dtype=wide, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        one = _of_top if isinstance(teacher, Top) else _of_all
        for rows in _blocks(student):
            logs = _logs(student[rows], temperature, wide)
            found[rows], slope = one(teacher[rows], logs, temperature, gradient is not None)
            if gradient is not None:
                gradient[rows] = slope if temperature == 1 else slope.mul_(temperature)
        ctx.gradient = gradient
        return found.mul_(temperature**2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factors: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None  # not to be alive longer than this
        if not bool((factors == 1).all()):
            for rows in _blocks(gradient):
                gradient[rows] = gradient[rows].to(factors.dtype).mul_(factors[rows, None])
        return gradient, None, None


def _blocks(logits: torch.Tensor) -> Iterator[slice]:
    block = BLOCK if logits.device.type == "cpu" else GPU_BLOCK
    step = max(1, block // logits.shape[-1])
    return (slice(first, first + step) for first in range(0, len(logits), step))


def _logs(logits: torch.Tensor, temperature: float, dtype: torch.dtype) -> torch.Tensor:
    """Logarithmic probabilities."""
    logits = logits.to(dtype)
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)


def _of_all(teacher: torch.Tensor, logs: torch.Tensor, temperature: float, slope: bool) -> tuple[torch.Tensor, Any]:
    """The divergence, and its gradient with regard to the student's logits divided by the temperature.

    Args:
        logs: the student's logarithmic probabilities; overwritten.
        slope: whether the gradient is wanted.
    """
    wanted = _logs(teacher, temperature, logs.dtype)
    probable = wanted.exp()
    found = torch.sub(wanted, logs).mul_(probable).sum(-1)
    if not bool(found.isfinite().all()):  # a second pass only where something is excluded: it is slow on CPUs
        found = _weighted(probable, wanted, logs).sum(-1)
    return found, logs.exp_().sub_(probable) if slope else None


def _of_top(teacher: Top, logs: torch.Tensor, temperature: float, slope: bool) -> tuple[torch.Tensor, Any]:
    """The same, of the most probable tokens and all others as one."""
    wanted = teacher.logs.to(logs.dtype)
    probable = wanted.exp()
    total = probable.sum(-1, keepdim=True)
    found = _weighted(probable, wanted, logs.gather(-1, teacher.tokens)).sum(-1, keepdim=True)
    if teacher.tokens.shape[-1] < logs.shape[-1]:
        left = (1 - total).clamp_(min=0)
        # Of the student's others: the logarithms of their probabilities, and of the sum.
        rest = logs.scatter(-1, teacher.tokens, -math.inf)
        others = torch.where(left > 0, rest.logsumexp(-1, keepdim=True), 0.0)
        found += torch.where(left > 0, left * (left.clamp(min=1e-30).log() - others), 0.0)
        if slope:
            among = rest.sub_(others).exp_().mul_(left)
            return found[:, 0], logs.exp_().mul_(total + left).sub_(among).scatter_add_(-1, teacher.tokens, -probable)
    return found[:, 0], logs.exp_().mul_(total).scatter_add_(-1, teacher.tokens, -probable) if slope else None


def _weighted(probable: torch.Tensor, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """The terms of a divergence: the teacher's probabilities, and the logarithms of both."""
    return torch.where(probable == 0, 0.0, probable * (teacher - student))  # NaN stays NaN
