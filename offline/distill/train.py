"""The steps of a distillation, and what is measured on held-out text between them."""

import math
import time
from dataclasses import dataclass

import torch

from ria_vllm.checkpoint.inputs import Inputs
from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.state import Course, Work
from ria_vllm.offline.distill.student.parameters import diverged
from ria_vllm.offline.distill.student.student import TERMS, Student
from ria_vllm.offline.distill.teacher.teacher import read
from ria_vllm.offline.distill.teacher.two_part import TwoPart
from ria_vllm.offline.distill.text import batch_of
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.progress import Monitor

# Seconds between two lines about the loss.
EVERY = 30.0
Scores = dict[str, dict[str, float]]
HeldOut = dict[str, list[tuple[torch.Tensor, torch.Tensor]]]


@dataclass
class Training:
    """One run, and what its steps need.

    windows: integers [windows, seq_len].
    held_out: name of a held-out text -> its windows, int64 [tokens] of one length, each with what the teacher's head
        reads of it [tokens, hidden]: the teacher is asked only once.
    inputs: what must not have changed when a state is saved.
    save_every: seconds between two states in the work folder.
    """

    recipe: Distillation
    student: Student
    teacher: TwoPart
    windows: torch.Tensor
    held_out: HeldOut
    work: Work
    ranks: Ranks
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
        recipe, pace = self.recipe, self.student.pace
        pace.lr, pace.number = recipe.rate(step), step + 1
        assert recipe.micro_batch is not None
        mine = range(self.ranks.rank, recipe.batch // recipe.micro_batch, self.ranks.size)
        # On the device: the processes' group on GPUs takes nothing else.
        total = torch.zeros(len(TERMS), dtype=torch.float64, device=self.student.two.model.device)
        for micro in mine:
            pace.last = micro == mine[-1]
            tokens = self.windows[batch_of(recipe, step, micro)].to(self.student.two.model.device, torch.int64)
            loss, terms = self.student.loss(tokens, read(self.teacher, tokens), self.teacher, recipe.text_loss)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise diverged(step + 1, f"loss {value}")
            (loss / (recipe.batch * recipe.seq_len)).backward()
            total += terms.to(total.device)
        self.ranks.all_reduce(total)
        total[TERMS.index("text")] *= recipe.seq_len / (recipe.seq_len - 1)
        return total.tolist()

    @torch.no_grad()
    def _scores(self) -> Scores:
        """Of the student as it is: its perplexity, and KL(teacher, student) in nats a token, by the texts' names.

        Raises:
            RiaError: logits that are not finite.
        """
        found = {}
        for name, windows in self.held_out.items():
            total = torch.zeros(len(TERMS), dtype=torch.float64)
            for window, hidden in self.monitor.steps(windows, "measuring", len(windows)):
                tokens = window[None].to(self.student.two.model.device)
                total += self.student.loss(tokens, hidden, self.teacher, 1.0)[1]
            count, length = len(windows), len(windows[0][0])
            kl, mean = float(total[0]) / (count * length), float(total[1]) / (count * (length - 1))
            if not math.isfinite(mean) or not math.isfinite(kl):
                raise RiaError(
                    f"{name}: the student's predictions are not finite. Give a smaller --lr, or check that the model "
                    "works if this was before the first step."
                )
            found[name] = {"perplexity": math.exp(min(mean, 700.0)), "kl": kl}
        return found

    def _measure(self, course: Course, rate: float = 0.0) -> None:
        scores = self.ranks.broadcast(self._scores())  # all stop together, though devices round differently
        point = course.point(course.step * self.recipe.batch * self.recipe.seq_len, scores)
        words = [_terms([point[name] for name in TERMS], 1)] if "kl" in point else []
        words += [f"{rate:.0f} tokens/s"] if rate else []
        words += [f"{name}: perplexity {one['perplexity']:.2f}, KL {one['kl']:.4f}" for name, one in scores.items()]
        self.monitor.say(f"{self._place(course)}: {', '.join(words)}" if words else self._place(course))
        if scores and course.judge(self._loss_of(next(iter(scores.values()))), self.recipe.patience):
            self.work.save_result(self.student, course.step)

    def _loss_of(self, score: dict[str, float]) -> float:
        """What the loss is on held-out text."""
        return score["kl"] + self.recipe.text_loss * math.log(score["perplexity"])

    def _save(self, course: Course, over: bool = False) -> None:
        """Save what a resumed run needs. If training is `over`, it needs no parameters: the result is saved already."""
        self.inputs.check()
        with self.monitor.phase("saving the state"):
            if not over and self.ranks.first:
                self.work.save_parameters(self.student, course.step)
            self.ranks.barrier()
            if self.ranks.first:
                self.work.save_course(course)
            self.ranks.barrier()

    def _place(self, course: Course) -> str:
        return f"step {course.step} of {self.recipe.steps}"


def _terms(sums: list[float], tokens: int) -> str:
    return ", ".join(f"{name} {value / tokens:.4f}" for name, value in zip(TERMS, sums, strict=True) if value)
