"""The steps of a distillation, and what is measured on held-out text between them."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from ria_vllm.checkpoint.inputs import Inputs
from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.divergence import divergence
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.state import Course, Losses, Work, means
from ria_vllm.offline.distill.student.parameters import diverged
from ria_vllm.offline.distill.student.student import Student
from ria_vllm.offline.distill.teacher import asked
from ria_vllm.progress import Monitor

# Seconds between two lines about the loss.
EVERY = 30.0
Scores = dict[str, dict[str, float]]


@dataclass
class Training:
    """One run, and what its steps need.

    teacher: the dense model, of transformers.
    windows: integers [windows, seq_len].
    held_out: name of a held-out text -> its windows, int64 [windows, tokens].
    inputs: what must not have changed when a state is saved.
    save_every: seconds between two states in the work folder.
    """

    recipe: Distillation
    student: Student
    teacher: Any
    windows: torch.Tensor
    held_out: dict[str, torch.Tensor]
    work: Work
    monitor: Monitor
    inputs: Inputs
    save_every: float

    def run(self) -> Course:
        """All steps, or those that an interrupted run has left; the result is in the work folder.

        Raises:
            RiaError: training diverges, or an input has changed.
        """
        self.inputs.check()
        recipe = self.recipe
        course = self.work.course() or Course()
        if course.step:
            self.monitor.say(f"resuming after step {course.step} of {recipe.steps}")
            if course.step == recipe.steps:
                return course
            self.work.restore(self.student, course.step)
        else:
            self._measure(course)
        begun, before = time.monotonic(), course.step
        saved = said = begun
        left = range(course.step, recipe.steps)
        for step in self.monitor.steps(left, "training", len(left)):
            losses = self._step(step)
            course.add(losses)
            now = time.monotonic()
            rate = (course.step - before) * recipe.tokens_in_step / (now - begun)
            if recipe.measured_after(course.step):
                self._measure(course, rate)
            elif now - said > EVERY:
                said = now
                self.monitor.say(f"{self._place(course)}: kl {losses[0]:.4f}, {rate:.0f} tokens/s")
            if now - saved > self.save_every and course.step < recipe.steps:
                self._save(course)
                saved = time.monotonic()
        if course.best is None:
            self.work.save_result(self.student, course.step)
        elif course.best[0] == 0:
            self.monitor.warn(
                f"{recipe.eval_text[0]}: the held-out divergence was never as low as before the first step, so the "
                "result has the weights from before training. It can be trained again: `ria-vllm distill` with a lower "
                "--lr, or more --tokens."
            )
        self._save(course, over=True)
        return course

    def _step(self, step: int) -> Losses:
        """One step, counted from 0; what its tokens lose before it."""
        recipe, pace = self.recipe, self.student.pace
        pace.lr, pace.number = recipe.rate(step), step + 1
        windows = self.windows[step * recipe.batch : (step + 1) * recipe.batch]
        tokens = windows.to(self.student.model.device, torch.int64)
        wanted = asked(self.teacher, tokens)
        logits = self.student.logits(tokens)
        slope = torch.empty_like(logits)
        losses = _losses(wanted, logits.detach(), tokens, slope)
        del wanted
        if not math.isfinite(losses[0]):
            raise diverged(step + 1, f"loss {losses[0]}")
        logits.backward(slope.div_(len(slope)))
        return losses

    @torch.no_grad()
    def _scores(self) -> Scores:
        """Of the student as it is: both perplexities, and KL(teacher, student) in nats a token, by the texts' names.

        Raises:
            RiaError: logits that are not finite.
        """
        found = {}
        for name, windows in self.held_out.items():
            losses = []
            for window in self.monitor.steps(windows, "measuring", len(windows)):
                tokens = window[None].to(self.student.model.device)
                logits = self.student.logits(tokens)
                losses.append(_losses(asked(self.teacher, tokens), logits, tokens))
            if not all(math.isfinite(kl + loss) for kl, loss, _ in losses):
                raise RiaError(
                    f"{name}: the student's predictions are not finite. Give a smaller --lr, or check that the model "
                    "works if this was before the first step."
                )
            found[name] = means(losses)
        return found

    def _measure(self, course: Course, rate: float = 0.0) -> None:
        scores = self._scores()
        point = course.point(course.step * self.recipe.tokens_in_step, scores)
        words = [f"kl {point['kl']:.4f}"] if "kl" in point else []
        words += [f"{rate:.0f} tokens/s"] if rate else []
        words += [f"{name}: perplexity {one['perplexity']:.2f}, KL {one['kl']:.4f}" for name, one in scores.items()]
        self.monitor.say(f"{self._place(course)}: {', '.join(words)}" if words else self._place(course))
        if scores and course.judge(next(iter(scores.values()))["kl"]):
            self.work.save_result(self.student, course.step)

    def _save(self, course: Course, over: bool = False) -> None:
        """Save what a resumed run needs. If training is `over`, it needs no parameters: the result is saved already."""
        self.inputs.check()
        with self.monitor.phase("saving the state"):
            if not over:
                self.work.save_parameters(self.student, course.step)
            self.work.save_course(course)

    def _place(self, course: Course) -> str:
        return f"step {course.step} of {self.recipe.steps}"


def _losses(
    teacher: torch.Tensor, student: torch.Tensor, tokens: torch.Tensor, slope: torch.Tensor | None = None
) -> Losses:
    """Of these tokens.

    Args:
        teacher, student, slope: as for `divergence`.
        tokens: int64 [sequences, tokens]. Nothing follows the last one of a sequence.
    """
    found = divergence(teacher, student, slope, tokens.roll(-1, 1).flatten())
    loss, dense = found[1:].view(2, *tokens.shape)[..., :-1].flatten(1).mean(1, dtype=torch.float64).tolist()
    return float(found[0].mean(dtype=torch.float64)), loss, dense
