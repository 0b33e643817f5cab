"""Where a run is, and how it went so far: all that a resumed run must know besides the parameters."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from ria_vllm.offline.distill.heldout import Score
from ria_vllm.offline.distill.loss import TERMS


@dataclass
class Course:
    """The course of a run.

    step: how many are done.
    sums: of the terms of the loss, over the tokens since the last point of the curve; `counted` are these tokens.
    curve: points; see `point`.
    best: the step after which the held-out loss was lowest, and that loss; None: nothing is held out. 0 is the start.
    lowest: the held-out loss of the best step of training, which may be above that of the start.
    worse: measurements since that step.
    stopped: whether the run is over, because it got no better.
    """

    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * len(TERMS))
    counted: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    best: tuple[int, float] | None = None
    lowest: float | None = None
    worse: int = 0
    stopped: bool = False

    def add(self, terms: list[float], tokens: int) -> None:
        """Count a step.

        Args:
            terms: sums over its tokens.
        """
        self.step += 1
        self.sums = [total + term for total, term in zip(self.sums, terms, strict=True)]
        self.counted += tokens

    def point(self, tokens: int, scores: dict[str, Score]) -> dict[str, Any]:
        """Add a point to the curve: the mean of each term since the last one, and the scores of held-out texts.

        Args:
            tokens: that were trained on until now.
        """
        found: dict[str, Any] = {"step": self.step, "tokens": tokens}
        if self.counted:
            found |= {name: total / self.counted for name, total in zip(TERMS, self.sums, strict=True)}
        if scores:
            found["held_out"] = {name: score.dump() for name, score in scores.items()}
        found = json.loads(json.dumps(found, sort_keys=True))  # in the order in which a resumed run reads it
        self.curve.append(found)
        self.sums, self.counted = [0.0] * len(TERMS), 0
        return found

    def judge(self, loss: float, patience: int) -> bool:
        """Take note of a held-out loss; whether it is the lowest so far.

        It may rise in the first steps, while the learning rate is high, and fall below that of the start later. So what
        counts against `patience` are measurements that are no better than an earlier one of training.
        """
        if self.step and (self.lowest is None or loss < self.lowest):
            self.lowest, self.worse = loss, 0
        elif self.step:
            self.worse += 1
            self.stopped = self.worse >= patience
        if self.best is None or loss < self.best[1]:
            self.best = (self.step, loss)
            return True
        return False

    def dump(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def restored(cls, found: dict[str, Any]) -> "Course":
        best = found["best"]
        return cls(**found | {"best": None if best is None else (best[0], best[1])})
