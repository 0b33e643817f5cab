"""The steps of a distillation."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from ria_vllm.inputs import Inputs
from ria_vllm.offline.distill.heldout import HeldOut, Score
from ria_vllm.offline.distill.loss import TERMS
from ria_vllm.offline.distill.parameters import Pace, diverged
from ria_vllm.offline.distill.progress import Course
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.state import Work
from ria_vllm.offline.distill.student import Student
from ria_vllm.offline.distill.text import batch_of
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.progress import Monitor

# Seconds between two lines about the loss.
EVERY = 30.0


@dataclass
class Training:
    """One run, and what its steps need.

    windows: integers [windows, seq_len].
    answers: `Teacher` or `CachedTeacher`. logits_of: the former, for the logits of its hidden states.
    inputs: what must not have changed when a state is saved.
    save_every: seconds between two states in the work folder.
    sharded: whether each process has only some rows of the parameters.
    """

    recipe: Distillation
    student: Student
    pace: Pace
    answers: Any
    logits_of: Any
    windows: torch.Tensor
    held_out: HeldOut
    work: Work
    ranks: Ranks
    monitor: Monitor
    inputs: Inputs
    save_every: float
    sharded: bool = False

    def run(self) -> Course:
        """All steps, or those that an interrupted run has left; the result is in the work folder.

        Raises:
            RiaError: training diverges, or an input has changed.
        """
        self.inputs.check()
        recipe = self.recipe
        course = self.ranks.broadcast(self.work.course() if self.ranks.first else None) or Course()
        if course.step:
            self.monitor.say(f"resuming after step {course.step} of {recipe.steps}")
            if course.stopped or course.step == recipe.steps:
                return course
            self.work.restore(self.student, course.step)
        else:
            self._measure(course)
        saved = said = time.monotonic()
        begun, before = said, course.step
        left = range(course.step, recipe.steps)
        for step in self.monitor.steps(left, "training", len(left)):
            terms = self._step(step)
            tokens = recipe.batch * recipe.seq_len
            course.add(terms, tokens)
            now = time.monotonic()
            rate = (course.step - before) * tokens / (now - begun)
            if recipe.measured_after(course.step):
                self._measure(course, rate)
            elif now - said > EVERY:
                said = now
                self.monitor.say(f"{self._place(course)}: {_terms(terms, tokens)}, {rate:.0f} tokens/s")
            if course.stopped:
                self.monitor.say(f"the held-out loss has not fallen {course.worse} times in a row, so this is enough")
                break
            if self.ranks.broadcast(now - saved > self.save_every) and course.step < recipe.steps:
                self._save(course)
                saved = time.monotonic()
        if course.best is None:
            self.work.save_result(self.student, course.step)
        elif course.best[0] == 0:
            self.monitor.warn(
                f"{self.recipe.eval_text[0]}: the held-out loss was never as low as before the first step, so the "
                "result has the weights from before training. It can be trained again: `ria-vllm distill` with a lower "
                "--lr, or more --tokens."
            )
        self._save(course, over=True)
        return course

    def _step(self, step: int) -> list[float]:
        """One step; the sums of the loss's terms over its tokens, of all processes.

        That of the text is extrapolated from the tokens with a next one to all, so that its mean is the text's loss.
        """
        recipe, pace = self.recipe, self.pace
        pace.lr, pace.number = recipe.rate(step), step + 1
        mine = range(self.ranks.rank, recipe.batch // recipe.micro_batch, self.ranks.size)
        # On the device: the processes' group on GPUs takes nothing else.
        total = torch.zeros(len(TERMS), dtype=torch.float64, device=self.student.two.model.device)
        for micro in mine:
            pace.last = micro == mine[-1]
            numbers = batch_of(recipe, step, micro)
            tokens = self.windows[numbers].to(self.student.two.model.device, torch.int64)
            answer = self.answers.answer(tokens, numbers)
            loss, terms = self.student.loss(tokens, answer, self.logits_of, recipe.loss)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise diverged(step + 1, f"loss {value}")
            # FSDP takes the mean of what the processes' losses give; they are parts of a sum.
            (loss * (self.ranks.size if self.sharded else 1) / (recipe.batch * recipe.seq_len)).backward()
            total += terms.to(total.device)
        self.ranks.all_reduce(total)
        total[TERMS.index("text")] *= recipe.seq_len / (recipe.seq_len - 1)
        return total.tolist()

    def _measure(self, course: Course, rate: float = 0.0) -> None:
        scores = self.held_out.measure(self.student, self.monitor) if self.held_out.texts else {}
        scores = self.ranks.broadcast(scores)  # all go on and stop together, though devices round differently
        point = course.point(course.step * self.recipe.batch * self.recipe.seq_len, scores)
        words = [_terms([point[name] for name in TERMS], 1)] if "kl" in point else []
        words += [f"{rate:.0f} tokens/s"] if rate else []
        words += [f"{name}: {score}" for name, score in scores.items()]
        self.monitor.say(f"{self._place(course)}: {', '.join(words)}" if words else self._place(course))
        if scores:
            better = course.judge(self._loss_of(next(iter(scores.values()))), self.recipe.patience)
            if better:
                self.work.save_result(self.student, course.step)

    def _loss_of(self, score: Score) -> float:
        """What the loss is on held-out text, without the part of hidden states."""
        kl, text = self.recipe.loss.kl, self.recipe.loss.text
        return kl * score.kl + text * math.log(score.perplexity) if kl or text else score.kl

    def _save(self, course: Course, over: bool = False) -> None:
        """Save what a resumed run needs. If training is `over`, it needs no parameters: the result is saved already."""
        self.inputs.check()
        with self.monitor.phase("saving the state"):
            if not over and (self.ranks.first or self.sharded):
                self.work.save_parameters(self.student, course.step)
            self.ranks.barrier()
            if self.ranks.first:
                self.work.save_course(course)
            self.ranks.barrier()

    def _place(self, course: Course) -> str:
        return f"step {course.step} of {self.recipe.steps}"


def _terms(sums: list[float], tokens: int) -> str:
    return ", ".join(f"{name} {value / tokens:.4f}" for name, value in zip(TERMS, sums, strict=True) if value)
