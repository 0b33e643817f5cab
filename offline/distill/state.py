"""What a run keeps in its work folder, so that it can be killed at any moment and go on to the same bytes.

A state is one file for each trained parameter, then a file that names the step. The state of an earlier step stays
until that file is in place. So do the tensors of the best step so far, which are stored as they will be written.
"""

from collections.abc import Iterable

import torch

from ria_vllm.offline.distill.parameters import diverged
from ria_vllm.offline.distill.progress import Course
from ria_vllm.offline.distill.student import Student
from ria_vllm.sparse_linear import not_finite
from ria_vllm.weight_format import name_of
from ria_vllm.writer import CheckpointWriter

STATE = "state"


class Work:
    """The state of a run in the work folder.

    Args:
        part: the end of the keys under which this process keeps its rows of the parameters; "" if it has all of them.
        first: whether this process writes what all have.
    """

    def __init__(self, writer: CheckpointWriter, part: str = "", first: bool = True):
        self.writer, self.part, self.first = writer, part, first

    def save_parameters(self, student: Student, step: int) -> None:
        """The parameters after a step. `save_course` makes them count."""
        for number, trained in enumerate(student.trained.values()):
            state = trained.state()
            _check_finite(state, step)
            self.writer.write(self._key(step, number), state)

    def save_course(self, course: Course) -> None:
        """Make what was saved for this step count, and delete what no longer does."""
        self.writer.write(STATE, {}, course.dump())
        best = course.best[0] if course.best else course.step
        self._keep_only({f"{STATE}-{course.step:09d}", _best(best)})

    def course(self) -> Course | None:
        """That of the interrupted run; None if it has saved nothing."""
        return Course.restored(self.writer.record(STATE)) if self.writer.has(STATE) else None

    def restore(self, student: Student, step: int) -> None:
        """Put the parameters after a step into the student."""
        for number, trained in enumerate(student.trained.values()):
            trained.restore(self.writer.read(self._key(step, number))[0])

    def save_result(self, student: Student, step: int) -> None:
        """The tensors of a step that is the best so far, or the last. All processes must call."""
        for number, name in enumerate(student.trained):
            tensors = student.tensors(name)
            _check_finite(tensors, step)
            if self.first:
                self.writer.write(f"{_best(step)}-{number:06d}", tensors)

    def results(self, names: Iterable[str], step: int) -> dict[str, str]:
        """Trained tensor -> the key of what `save_result` wrote for it."""
        return {name: f"{_best(step)}-{number:06d}" for number, name in enumerate(names)}

    def _key(self, step: int, number: int) -> str:
        return f"{STATE}-{step:09d}-{number:06d}{self.part}"

    def _keep_only(self, beginnings: set[str]) -> None:
        for path in self.writer.work.glob("units/*.safetensors"):
            kind, _, rest = path.stem.partition("-")
            if kind in (STATE, "best") and rest and f"{kind}-{rest[:9]}" not in beginnings:
                path.unlink()


def _check_finite(tensors: dict[str, torch.Tensor], step: int) -> None:
    """Refuse what cannot be gone on from, or served."""
    for name, tensor in tensors.items():
        if not_finite(tensor):
            raise diverged(step, f"{name} is not finite in {name_of(tensor.dtype)}")


def _best(step: int) -> str:
    return f"best-{step:09d}"
