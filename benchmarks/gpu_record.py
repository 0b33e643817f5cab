"""What the steps of gpu_session have found: a file that only grows, so that no interruption loses a finished row.

Each line is a JSON object that names its part: {"part", "event": "start"}, then its rows {"part", "section", "row"},
then {"part", "event": "end", "outcome"}. A part that did not pass may be run again. Of its attempts, the one that says
most counts: one that passed, else the latest that failed, else the longest that was cut short. If none passed, times
from the others are kept too.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from benchmarks.gpu_check import OUT_OF_TIME, Part, supervise
from benchmarks.gpu_tiles import SHAPE
from benchmarks.gpu_timing import Row

CUT, FAILED, PASSED = "cut", "failed", "passed"
_RANKS = (CUT, FAILED, PASSED)
# Sections whose rows are measurements, and the keys that tell these apart.
_MEASUREMENTS = {
    "times": ("kernel", "out_features", "in_features", "tokens"),
    "tiles": (*SHAPE, "tokens", "tile", "split"),
    "decode": ("model", "tokens", "check"),
}


@dataclass
class Attempt:
    """One run of a part: its rows, each with its section, and how it ended."""

    outcome: str = CUT
    rows: list[tuple[str, Row]] = field(default_factory=list)


class Record:
    """The attempts of all parts in the file `path`, which is created when the first part starts."""

    def __init__(self, path: Path):
        self.path = path
        self._attempts: dict[str, list[Attempt]] = {}
        self._file: IO[str] | None = None
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut off in the middle of the line
            self._take(entry)

    def _take(self, entry: Row) -> None:
        attempts = self._attempts.setdefault(entry["part"], [])
        if entry.get("event") == "start":
            attempts.append(Attempt())
        elif entry.get("event") == "end":
            attempts[-1].outcome = entry["outcome"]
        else:
            attempts[-1].rows.append((entry["section"], entry["row"]))

    def _write(self, entry: Row) -> None:
        text = json.dumps(entry, allow_nan=False)
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            ended = not self.path.exists() or self.path.read_text()[-1:] in ("", "\n")
            self._file = self.path.open("a")
            self._file.write("" if ended else "\n")
        print(text, file=self._file, flush=True)
        self._take(entry)

    def start(self, part: str) -> None:
        self._write({"part": part, "event": "start"})

    def add(self, part: str, section: str, row: Row) -> Row:
        """Returns the row as recorded: a failed one if it has a number that JSON does not have."""
        try:
            self._write({"part": part, "section": section, "row": row})
        except ValueError:
            row = {"part": part, "error": "a number that JSON does not have", "row": repr(row), "ok": False}
            self._write({"part": part, "section": section, "row": row})
        return row

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
        return self._with(PASSED)

    @property
    def failed(self) -> frozenset[str]:
        return self._with(FAILED)

    def _with(self, outcome: str) -> frozenset[str]:
        return frozenset(part for part, one in self.outcomes.items() if one == outcome)

    def rows(self, section: str | None = None) -> list[Row]:
        """The rows of a section, or of all, part by part."""
        return [row for where, row in self.rows_by_section() if section in (None, where)]

    def rows_by_section(self) -> Iterator[tuple[str, Row]]:
        """(section, row) for all rows, part by part."""
        for part, attempts in self._attempts.items():
            best = self.best(part)
            yield from best.rows
            if best.outcome != PASSED:
                yield from _other_measurements(best, attempts)


def _other_measurements(best: Attempt, attempts: Sequence[Attempt]) -> Iterator[tuple[str, Row]]:
    """What `best` did not measure, and others did; of two others, the later one counts."""

    def identity(section: str, row: Row) -> tuple:
        return section, *(row.get(key) for key in _MEASUREMENTS.get(section, ()))

    known = {identity(*found) for found in best.rows}
    for attempt in reversed(attempts):
        for section, row in attempt.rows:
            if section in _MEASUREMENTS and "error" not in row and identity(section, row) not in known:
                known.add(identity(section, row))
                yield section, row


def missing(factory: Callable[[], Sequence[Part]], passed: frozenset[str], failed: frozenset[str]) -> list[Part]:
    """The parts of `factory` that have not passed yet; last those that failed, which may fail again."""
    return sorted((part for part in factory() if part.name not in passed), key=lambda part: part.name in failed)


Runner = Callable[[Callable[[], Sequence[Part]], float], Iterator[tuple[int, Row]]]


def run_missing(
    record: Record,
    factory: Callable[[], Sequence[Part]],
    deadline: float,
    show: Callable[[str, Row], None],
    runner: Runner | None = None,
) -> None:
    """Run what has not passed yet, first what has not failed either, and record it.

    Args:
        factory: see `supervise`.
        deadline: of `time.monotonic`; nothing new is started after it.
        show: called with each row that was recorded, after its section.
        runner: `supervise`, or something like it.
    """
    unfinished = partial(missing, factory, record.passed, record.failed)
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
            row = record.add(parts[index].name, parts[index].section, row)
            outcome = FAILED if row.get("ok") is False else outcome
            show(parts[index].section, dict(row))
    if current >= 0:
        record.end(parts[current].name, outcome)
