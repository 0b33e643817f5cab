"""What the student is trained to: the teacher's predictions, its hidden states, and the text itself."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ria_vllm.errors import RiaError

TERMS = ("kl", "hidden", "text")


@dataclass(frozen=True)
class Loss:
    """The weights of the terms, and how predictions are compared.

    kl: of the divergence KL(teacher, student) of a token's predictions, in nats, times the square of `temperature`.
    hidden: of the squared error of each decoder layer's output relative to the teacher's own squared norm, averaged
        over layers (SquareHead, arXiv 2310.06927).
    text: of the cross entropy of the text's next token.
    temperature: divides the logits of both models before they are compared.
    top_k: how many of the teacher's most probable tokens are compared one by one; all others count as one token. 0: no
        limit.
    """

    kl: float = 1.0
    hidden: float = 0.0
    text: float = 0.0
    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        weights = {"kl": self.kl, "hidden": self.hidden, "text": self.text}
        if any(not math.isfinite(w) or w < 0 for w in weights.values()) or not any(weights.values()):
            raise RiaError(f"--loss {self}: weights are at least 0, and one of them is more.")
        if not 0.05 <= self.temperature <= 20:
            raise RiaError(f"--temperature {self.temperature}: choose a number from 0.05 to 20.")
        if self.top_k < 0:
            raise RiaError(f"--top-k {self.top_k}: at least 0, which compares all of the vocabulary.")

    @classmethod
    def parse(cls, text: str, temperature: float = 1.0, top_k: int = 0) -> "Loss":
        """From `kl=1,hidden=0.5`; a term without a weight has the weight 1, one that is not named 0.

        Raises:
            RiaError: another term, or no number.
        """
        found = dict.fromkeys(TERMS, 0.0)
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\w+)\s*(?:=\s*([0-9.eE+-]+)\s*)?", part)
            try:
                weight = float(match[2] or 1) if match else math.nan
            except ValueError:
                weight = math.nan
            if not match or match[1] not in TERMS or math.isnan(weight):
                raise RiaError(f"--loss {text!r}: give terms such as kl=1,hidden=0.5; there are {', '.join(TERMS)}.")
            found[match[1]] = weight
        return cls(**found, temperature=temperature, top_k=top_k)

    def __str__(self) -> str:
        return ",".join(f"{name}={getattr(self, name):g}" for name in TERMS if getattr(self, name))


def relative_error(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of hidden states [..., hidden]: the mean over tokens and layers of a token's squared error, relative to the
    teacher's squared norm."""
    parts = []
    for mine, wanted in zip(student, teacher, strict=True):
        wanted = wanted.float()
        parts.append(((mine.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)).mean())
    return torch.stack(parts).mean()


def next_token(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each token in nats: float32 [tokens]. Where `following` is -1, there is none: 0."""
    return F.cross_entropy(logits.float(), following, ignore_index=-1, reduction="none")


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
