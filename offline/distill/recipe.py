"""What a distillation should do: every option that affects the result, checked and written into the checkpoint."""

import math
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ria_vllm import __version__
from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration.mixture import check_fraction, written_of
from ria_vllm.offline.distill.loss import Loss
from ria_vllm.offline.model import dtypes
from ria_vllm.offline.publish import published

ALSO = ("norms", "biases", "scales")
COMPUTE_DTYPES = tuple(choice for choice in dtypes.CHOICES if choice != "float16")
# By the seed itself, the dense model writes the text that `compress` calibrates on.
TEXT_SEED = 1_000_003


@dataclass(frozen=True)
class Distillation:
    """The options; `ria-vllm distill --help` explains each.

    micro_batch: None: as `among` says.

    Raises:
        RiaError: an invalid value.
    """

    tokens: int
    text: str = "self"
    self_written: float = 0.0
    seq_len: int = 512
    batch: int = 2
    micro_batch: int | None = None
    passes: int = 1
    lr: float = 3e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    loss: Loss = field(default_factory=Loss)
    train: tuple[str, ...] = ("scales",)
    cache_teacher: bool = False
    eval_text: tuple[str, ...] = ()
    eval_tokens: int = 8192
    evals: int = 10
    patience: int = 3
    compute_dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        whole = {"tokens": 2, "seq_len": 2, "batch": 1, "micro_batch": 1, "passes": 1, "eval_tokens": 2, "evals": 1}
        for name, least in (whole | {"patience": 1}).items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise RiaError(f"--{name.replace('_', '-')} {getattr(self, name)}: give at least {least}.")
        for name, most in (("lr", 1.0), ("warmup", 1.0), ("weight_decay", 1.0), ("clip", 1e6)):
            if not (math.isfinite(getattr(self, name)) and 0 <= getattr(self, name) <= most):
                raise RiaError(f"--{name.replace('_', '-')} {getattr(self, name)}: give a number from 0 to {most:g}.")
        check_fraction(self.self_written, self.windows, self.text)
        if self.batch % (self.micro_batch or 1):
            raise RiaError(f"--batch {self.batch} is not a multiple of --micro-batch {self.micro_batch}.")
        if self.tokens < self.batch * self.seq_len:
            raise RiaError(
                f"--tokens {self.tokens}: a single step takes {self.batch * self.seq_len} (--batch {self.batch} "
                f"sequences of --seq-len {self.seq_len}). Give more tokens, or smaller steps."
            )
        for name in self.train:
            if name not in ALSO:
                raise RiaError(f"--train {name!r}: choose of {', '.join(ALSO)}, or give nothing to train no more.")
        if self.compute_dtype == "float16":
            raise RiaError(
                "--compute-dtype float16: small gradients would vanish in it. Give bfloat16 or float32, or leave it "
                "out."
            )
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise RiaError(f"--compute-dtype {self.compute_dtype!r}: choose one of {', '.join(COMPUTE_DTYPES)}.")
        if self.cache_teacher and not self.loss.top_k:
            raise RiaError("--cache-teacher keeps the teacher's most probable tokens: give their number as --top-k.")
        if self.cache_teacher and self.loss.hidden:
            raise RiaError("--cache-teacher does not keep hidden states, which --loss hidden needs. Leave one out.")

    def among(self, processes: int) -> "Distillation":
        """The recipe for so many processes. Where no micro-batch is given, a process's sequences of a step are one, so
        that it has no gradients to add up.

        Raises:
            RiaError: the micro-batches of a step cannot be divided evenly.
        """
        micro = self.micro_batch or max(1, self.batch // processes)
        if self.batch // micro % processes or self.batch % micro:
            way_out = f"Give a multiple of {processes} as --batch."
            if self.micro_batch:
                way_out = f"Give a multiple of {micro * processes} as --batch, or a smaller --micro-batch."
            in_parts = f" in micro-batches of {micro}" if self.micro_batch else ""
            raise RiaError(
                f"--batch {self.batch}{in_parts} cannot be divided evenly among {processes} processes. {way_out}"
            )
        return replace(self, micro_batch=micro)

    @property
    def text_seed(self) -> int:
        """What the teacher writes the text by."""
        return self.seed + TEXT_SEED

    @property
    def windows(self) -> int:
        """Sequences of text."""
        return self.tokens // self.seq_len

    @property
    def windows_written(self) -> int:
        """How many of them the teacher writes beside a text."""
        return written_of(self.windows, self.self_written)

    @property
    def steps(self) -> int:
        return self.windows * self.passes // self.batch

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: a linear warm-up, then half a cosine."""
        rising = max(1.0, self.warmup * self.steps)
        return self.lr * min(1.0, (step + 1) / rising) * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))

    def measured_after(self, step: int) -> bool:
        """Whether held-out text is measured after a step, counted from 1: `evals` times, evenly spread."""
        return step * self.evals // self.steps > (step - 1) * self.evals // self.steps

    def dump(self, teacher: str, revision: str | None = None) -> dict[str, Any]:
        """For config.json: enough to repeat the run, without local paths.

        Args:
            revision: the teacher's commit on the hub; None: a folder.
        """
        versions = {"ria-vllm": __version__} | {name: version(name) for name in ("torch", "transformers")}
        loss = {"loss": str(self.loss), "temperature": self.loss.temperature, "top_k": self.loss.top_k}
        shown = {
            "text": Path(self.text).name,
            "train": list(self.train),
            "eval_text": [Path(text).name for text in self.eval_text],
        }
        found: dict[str, Any] = {"teacher": published(teacher)}
        if revision is not None:
            found["teacher_revision"] = revision
        for name in (option.name for option in fields(self)):
            if name == "self_written" and not self.self_written:
                continue  # earlier versions did not have it
            found |= loss if name == "loss" else {name: shown.get(name, getattr(self, name))}
        return found | {"versions": versions}
