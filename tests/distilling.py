"""Distillations of tiny models, in this process or by the command."""

from pathlib import Path

import pytest

from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.run import Settings, distill
from ria_vllm.offline.distill.train import Training
from ria_vllm.progress import Monitor


def run(
    dense: Path,
    folder: Path,
    out: Path,
    source: Path,
    settings: Settings = Settings(),
    monitor: Monitor | None = None,
    **options,
) -> dict:
    fixed = {"tokens": 16 * 64, "seq_len": 64, "batch": 2, "text": str(source), "lr": 1e-4, "evals": 4}
    monitor = monitor or Monitor(shown=False)
    return distill(folder, str(dense), out, Distillation(**fixed | options), settings, monitor)


def stop_at(patch: pytest.MonkeyPatch, last: int) -> None:
    """Let training be interrupted as its step `last`, counted from 0, begins."""
    step = Training._step

    def stopping(self, number):
        if number == last:
            raise KeyboardInterrupt
        return step(self, number)

    patch.setattr(Training, "_step", stopping)


def command(dense: Path, folder: Path, out: Path, text: Path, *options: str, held_out: bool = True) -> list[str]:
    fixed = ["--tokens", "2048", "--seq-len", "64", "--data", str(text), "--save-every", "0", "--lr", "1e-4"]
    if held_out:
        fixed += ["--eval-data", str(text), "--eval-tokens", "256", "--evals", "4"]
    return ["distill", str(folder), "--teacher", str(dense), "-o", str(out), *fixed, *options]


def has_reached(units: Path, kind: str, step: int) -> bool:
    """Whether there is a state of this step or of a later one, which replaces it."""
    return any(int(path.name.split("-")[1]) >= step for path in units.glob(kind))
