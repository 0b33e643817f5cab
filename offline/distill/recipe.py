"""What a distillation should do: every option that affects the result, checked and written into the checkpoint."""

import math
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ria_vllm import __version__
from ria_vllm.errors import RiaError
from ria_vllm.offline.publish import published
from ria_vllm.offline.self_written import check_fraction

# By the seed itself, the dense model writes the text that `compress` calibrates on.
TEXT_SEED = 1_000_003
# The share of the steps in which the learning rate rises.
WARMUP = 0.05


class Distillation(BaseModel):
    """The options; `ria-vllm distill --help` explains each.

    Raises:
        RiaError: an invalid value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tokens: int = Field(ge=2)
    text: str = "self"
    self_written: float = 0.0
    seq_len: int = Field(512, ge=2)
    batch: int = Field(2, ge=1)
    lr: float = Field(3e-4, ge=0, le=1)
    eval_text: tuple[str, ...] = ()
    eval_tokens: int = Field(8192, ge=2)
    evals: int = Field(10, ge=1)
    # In float16, small gradients would vanish.
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    seed: int = 0

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            first = error.errors()[0]
            option = "-".join(["-", *map(str, first["loc"])]).replace("_", "-")
            raise RiaError(f"{option} {first['input']}: {first['msg']}.") from None

    @model_validator(mode="after")
    def _go_together(self) -> "Distillation":
        check_fraction(self.self_written, self.windows, self.text)
        if self.tokens < self.tokens_in_step:
            raise RiaError(
                f"--tokens {self.tokens}: a single step takes {self.tokens_in_step} (--batch {self.batch} "
                f"sequences of --seq-len {self.seq_len}). Give more tokens, or smaller steps."
            )
        return self

    def with_options(self, **changes: Any) -> "Distillation":
        """The same recipe but for these options, checked anew."""
        return Distillation(**self.model_dump() | changes)

    @property
    def windows(self) -> int:
        """Sequences of text."""
        return self.tokens // self.seq_len

    @property
    def steps(self) -> int:
        return self.windows // self.batch

    @property
    def tokens_in_step(self) -> int:
        return self.batch * self.seq_len

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: a linear warm-up, then half a cosine."""
        rising = max(1.0, WARMUP * self.steps)
        return self.lr * min(1.0, (step + 1) / rising) * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))

    def measured_after(self, step: int) -> bool:
        """Whether held-out text is measured after a step, counted from 1: `evals` times, evenly spread."""
        return step * self.evals // self.steps > (step - 1) * self.evals // self.steps

    def dump(self, teacher: str, revision: str | None = None) -> dict[str, Any]:
        """For config.json: enough to repeat the run, without local paths.

        Args:
            revision: the teacher's commit on the hub; None: a folder.
        """
        origin = {"teacher": published(teacher)} | ({} if revision is None else {"teacher_revision": revision})
        names = {"text": Path(self.text).name, "eval_text": [Path(text).name for text in self.eval_text]}
        versions = {"ria-vllm": __version__} | {name: version(name) for name in ("torch", "transformers")}
        return origin | self.model_dump() | names | {"versions": versions}
