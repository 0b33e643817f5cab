"""What a session on a GPU has found so far: a file that only grows, so that no interruption loses a finished row.

Each line is a JSON object that names its part: {"part", "event": "start"}, then its rows {"part", "section", "row"},
then {"part", "event": "end", "outcome"}. A part that did not pass may be run again. Of its attempts, the one that says
most counts: one that passed, else the latest that failed, else the longest that was cut short.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.gpu_check import OUT_OF_TIME, Part, supervise
from benchmarks.gpu_timing import Row

CUT, FAILED, PASSED = "cut", "failed", "passed"
_RANKS = (CUT, FAILED, PASSED)


@dataclass
class Attempt:
    """One run of a part: its rows, each with its section, and how it ended."""

    outcome: str = CUT
    rows: list[tuple[str, Row]] = field(default_factory=list)


class Record:
    """The attempts of all parts in the file `path`, which is created if it does not exist."""

    def __init__(self, path: Path):
        self.path = path
        self._attempts: dict[str, list[Attempt]] = {}
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut off in the middle of the line
            self._take(entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")
        if text and not text.endswith("\n"):
            self._file.write("\n")

    def _take(self, entry: Row) -> None:
        attempts = self._attempts.setdefault(entry["part"], [])
        if entry.get("event") == "start":
            attempts.append(Attempt())
        elif entry.get("event") == "end":
            attempts[-1].outcome = entry["outcome"]
        else:
            attempts[-1].rows.append((entry["section"], entry["row"]))

    def _write(self, entry: Row) -> None:
        self._take(entry)
        print(json.dumps(entry, allow_nan=False), file=self._file, flush=True)

    def start(self, part: str) -> None:
        self._write({"part": part, "event": "start"})

    def add(self, part: str, section: str, row: Row) -> None:
        self._write({"part": part, "section": section, "row": row})

    def end(self, part: str, outcome: str) -> None:
        self._write({"part": part, "event": "end", "outcome": outcome})

    def best(self, part: str) -> Attempt:
        """The attempt that counts; an empty one if there was none."""
        attempts = self._attempts.get(part) or [Attempt()]
        return max(
            reversed(attempts),
            key=lambda one: (_RANKS.index(one.outcome), len(one.rows) if one.outcome == CUT else 0),
        )

    @property
    def outcomes(self) -> dict[str, str]:
        """How each part ended, by name."""
        return {part: self.best(part).outcome for part in self._attempts}

    @property
    def passed(self) -> frozenset[str]:
        return frozenset(part for part, outcome in self.outcomes.items() if outcome == PASSED)

    def rows(self, section: str | None = None) -> list[Row]:
        """The rows of a section, or of all, part by part."""
        attempts = [self.best(part) for part in self._attempts]
        return [row for one in attempts for where, row in one.rows if section in (None, where)]


def missing(factory: Callable[[], Sequence[Part]], passed: frozenset[str]) -> list[Part]:
    """The parts of `factory` that have not passed yet."""
    return [part for part in factory() if part.name not in passed]


Runner = Callable[[Callable[[], Sequence[Part]], float], Iterator[tuple[int, Row]]]


def run_missing(
    record: Record,
    factory: Callable[[], Sequence[Part]],
    deadline: float,
    show: Callable[[str, Row], None],
    runner: Runner | None = None,
) -> None:
    """Run what has not passed yet, and record it.

    Args:
        factory: see `supervise`.
        deadline: of `time.monotonic`; nothing new is started after it.
        show: called with each row that was recorded, after its section.
        runner: `supervise`, or something like it.
    """
    unfinished = partial(missing, factory, record.passed)
    parts, current, outcome = unfinished(), -1, PASSED
    for index, row in (runner or supervise)(unfinished, deadline):
        if index != current:
            if current >= 0:
                record.end(parts[current].name, outcome)
            current, outcome = index, PASSED
            record.start(parts[index].name)
        if row.get("skipped") == OUT_OF_TIME:
            outcome = CUT
        elif "at" not in row or "error" in row:
            outcome = FAILED if row.get("ok") is False else outcome
            record.add(parts[index].name, parts[index].section, row)
            show(parts[index].section, dict(row))
    if current >= 0:
        record.end(parts[current].name, outcome)
