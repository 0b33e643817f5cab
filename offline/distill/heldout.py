"""How well the student predicts text that it is not trained on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.loss import Loss
from ria_vllm.offline.distill.student import Student
from ria_vllm.offline.distill.teacher import Answer
from ria_vllm.progress import Monitor


@dataclass(frozen=True)
class Score:
    """On one text: the student's perplexity, and KL(teacher, student) in nats a token.

    top_k: how many of the teacher's most probable tokens `kl` compares one by one, and all others as one, which makes
        it smaller; 0: all of the vocabulary.
    """

    perplexity: float
    kl: float
    top_k: int = 0

    def dump(self) -> dict[str, float]:
        """For the report: divergences that cannot be compared have different names."""
        return {"perplexity": self.perplexity, "kl_top_k" if self.top_k else "kl": self.kl}

    def __str__(self) -> str:
        of = f" of the top {self.top_k}" if self.top_k else ""
        return f"perplexity {self.perplexity:.2f}, KL{of} {self.kl:.4f}"


class HeldOut:
    """Texts that are measured again and again; the teacher reads them once.

    Args:
        texts: name -> int64 [windows, tokens].
        answers: name -> the teacher's, one for each window; its hidden states or most probable tokens.
        teacher: for the logits of its hidden states.
    """

    def __init__(self, texts: dict[str, torch.Tensor], answers: Mapping[str, Sequence[Answer]], teacher: Any):
        self.texts, self.answers, self.teacher = texts, answers, teacher

    @torch.no_grad()
    def measure(self, student: Student, monitor: Monitor) -> dict[str, Score]:
        """Of the student as it is, by the texts' names.

        Raises:
            RiaError: logits that are not finite.
        """
        loss, device = Loss(kl=1.0, text=1.0), student.two.model.device
        found = {}
        for name, windows in self.texts.items():
            total = torch.zeros(3, dtype=torch.float64)
            pairs = list(zip(windows, self.answers[name], strict=True))
            for window, answer in monitor.steps(pairs, "measuring", len(pairs)):
                total += student.loss(window[None].to(device), answer, self.teacher, loss)[1]
            count, length = windows.shape
            mean, kl = float(total[2]) / (count * (length - 1)), float(total[0]) / (count * length)
            if not math.isfinite(mean) or not math.isfinite(kl):
                raise RiaError(
                    f"{name}: the student's predictions are not finite. Give a smaller --lr, or check that the model "
                    "works if this was before the first step."
                )
            top = pairs[0][1].top
            found[name] = Score(math.exp(min(mean, 700.0)), kl, 0 if top is None else top.tokens.shape[-1])
        return found
