"""The model card's section of benchmark scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ria_vllm.model_card import END_OF_PERPLEXITY, card_table, plain, read_card, write_card

_BEGIN, _END = "<!-- ria-vllm: tasks -->", "<!-- ria-vllm: end of tasks -->"
_HEAD = ("task", "metric", "examples", "score", "base model", "recovery")
_HEADING = "## Benchmark tasks"


@dataclass(frozen=True)
class Score:
    """One metric of one task. Errors are standard errors; None: not known.

    Attributes:
        examples: how many were asked; None for a group of tasks.
        shots: examples in each prompt.
        dense: the base model's score.
        recovery: the score in percent of the base model's; None where lower is better, or without a base model.
    """

    task: str
    metric: str
    examples: int | None
    shots: int | None
    score: float
    error: float | None
    dense: float | None
    dense_error: float | None
    recovery: float | None

    def cells(self) -> tuple[str, ...]:
        asked = "" if self.examples is None else str(self.examples)
        shots = f", {self.shots}-shot" if self.shots is not None and asked else ""
        scores = _shown(self.score, self.error), _shown(self.dense, self.dense_error)
        return self.task, self.metric, asked + shots, *scores, _percent(self.recovery)


@dataclass(frozen=True)
class Average:
    """The mean over tasks of one metric each.

    Attributes:
        metrics: which metric of which task.
        recovery: the mean score in percent of the base model's mean score.
    """

    metrics: Mapping[str, str]
    score: float
    dense: float
    recovery: float | None

    def cells(self) -> tuple[str, ...]:
        tasks = f"mean of {len(self.metrics)} tasks" if len(self.metrics) > 1 else "mean of 1 task"
        names = ", ".join(dict.fromkeys(self.metrics.values()))
        return tasks, names, "", _shown(self.score, None), _shown(self.dense, None), _percent(self.recovery)


def _shown(score: float | None, error: float | None) -> str:
    if score is None:
        return ""
    return f"{score:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}%"


def note_tasks(folder: Path, rows: Sequence[Score], mean: Average | None, harness: str) -> None:
    """Put the scores of one run into the card, in the place of those of an earlier run. The rest of the card stays.

    Args:
        harness: its name and version.

    Raises:
        RiaError: there is no card, or it cannot be read or replaced.
    """
    card = read_card(folder)
    before, begun, rest = card.partition(_BEGIN)
    _, ended, after = rest.partition(_END)
    if not begun or not ended:
        before, found, after = card.partition(END_OF_PERPLEXITY)
        before, after = (before + found, after) if found else (card.rstrip("\n"), "\n")
        before += f"\n\n{_HEADING}\n\n"
    cells = [row.cells() for row in rows] + ([mean.cells()] if mean is not None else [])
    said = [card_table(_HEAD, [tuple(map(plain, row)) for row in cells]), _explained(harness, rows, mean)]
    write_card(folder, before + f"{_BEGIN}\n" + "\n\n".join(said) + f"\n{_END}" + after)


def _explained(harness: str, rows: Sequence[Score], mean: Average | None) -> str:
    text = f"Scores of {plain(harness)}, ± their standard errors."
    if any(row.recovery is not None for row in rows):
        text += " Recovery is the score in percent of the base model's, without subtracting the level of chance."
    if mean is not None:
        text += " The mean is over one metric of each task, acc_norm where there is one, and is then compared."
    return text
