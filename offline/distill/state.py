"""What a run keeps in its work folder, so that it can be killed at any moment and go on to the same bytes.

A state is one file for each trained parameter, then a file that names the step and how the run went so far. The state
of an earlier step stays until that file is in place. So do the tensors of the best step so far, which are stored as
they will be written.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ria_vllm.checkpoint.sparse_linear import not_finite
from ria_vllm.checkpoint.writer import CheckpointWriter
from ria_vllm.format.weight_format import name_of
from ria_vllm.offline.distill.student.parameters import diverged
from ria_vllm.offline.distill.student.student import Student

STATE = "state"
# Means of a token in nats: KL(teacher, student), the student's cross-entropy, the teacher's.
Losses = tuple[float, float, float]


def means(losses: Sequence[Losses]) -> dict[str, float]:
    """Of some that are of equally many tokens: the divergence, and the perplexities of both models."""
    kl, loss, dense = (sum(of) / len(losses) for of in zip(*losses, strict=True))
    perplexity, perplexity_dense = (math.exp(min(value, 700.0)) for value in (loss, dense))
    return {"kl": kl, "perplexity": perplexity, "perplexity_dense": perplexity_dense}


@dataclass
class Course:
    """The course of a run: all that a resumed run must know besides the parameters.

    step: how many are done.
    losses: of the steps since the last point of the curve.
    curve: points; see `point`.
    best: the step after which the held-out divergence was lowest, and that; None: nothing is held out. 0 is the start.
    """

    step: int = 0
    losses: list[Losses] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    best: tuple[int, float] | None = None

    def add(self, losses: Losses) -> None:
        """Count a step."""
        self.step += 1
        self.losses.append(losses)

    def point(self, tokens: int, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Add a point to the curve: the mean losses since the last one, and the scores of held-out texts.

        Args:
            tokens: that were trained on until now.
        """
        found: dict[str, Any] = {"step": self.step, "tokens": tokens}
        if self.losses:
            found |= means(self.losses)
        if scores:
            found["held_out"] = scores
        found = json.loads(json.dumps(found, sort_keys=True))  # in the order in which a resumed run reads it
        self.curve.append(found)
        self.losses = []
        return found

    def judge(self, loss: float) -> bool:
        """Take note of a held-out divergence; whether it is the lowest so far."""
        if self.best is None or loss < self.best[1]:
            self.best = (self.step, loss)
            return True
        return False

    @property
    def kept(self) -> int:
        """The step that is written: the best one, or the last if nothing is held out."""
        return self.best[0] if self.best else self.step


class Work:
    """The state of a run in the work folder."""

    def __init__(self, writer: CheckpointWriter):
        self.writer = writer

    def save_parameters(self, student: Student, step: int) -> None:
        """The parameters after a step. `save_course` makes them count."""
        for number, trained in enumerate(student.trained.values()):
            state = trained.state()
            _check_finite(state, step)
            self.writer.write(self._key(step, number), state)

    def save_course(self, course: Course) -> None:
        """Make what was saved for this step count, and delete what no longer does."""
        self.writer.write(STATE, {}, asdict(course))
        current = {f"{STATE}-{course.step:09d}", _best(course.kept)}
        for path in self.writer.work.glob("units/*.safetensors"):
            kind, _, rest = path.stem.partition("-")
            if kind in (STATE, "best") and rest and f"{kind}-{rest[:9]}" not in current:
                path.unlink()

    def course(self) -> Course | None:
        """That of the interrupted run; None if it has saved nothing."""
        if not self.writer.has(STATE):
            return None
        found = self.writer.record(STATE)
        return Course(**found | {"best": found["best"] and tuple(found["best"])})

    def restore(self, student: Student, step: int) -> None:
        """Put the parameters after a step into the student."""
        for number, trained in enumerate(student.trained.values()):
            trained.restore(self.writer.read(self._key(step, number))[0])

    def save_result(self, student: Student, step: int) -> None:
        """The tensors of a step that is the best so far, or the last."""
        for number, name in enumerate(student.trained):
            tensors = student.tensors(name)
            _check_finite(tensors, step)
            self.writer.write(f"{_best(step)}-{number:06d}", tensors)

    def results(self, names: Iterable[str], step: int) -> dict[str, str]:
        """Trained linear -> the key of what `save_result` wrote for it."""
        return {name: f"{_best(step)}-{number:06d}" for number, name in enumerate(names)}

    def _key(self, step: int, number: int) -> str:
        return f"{STATE}-{step:09d}-{number:06d}"


def _check_finite(tensors: dict[str, torch.Tensor], step: int) -> None:
    """Refuse what cannot be gone on from, or served."""
    for name, tensor in tensors.items():
        if not_finite(tensor):
            raise diverged(step, f"{name} is not finite in {name_of(tensor.dtype)}")


def _best(step: int) -> str:
    return f"best-{step:09d}"
