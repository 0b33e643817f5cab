"""What a user sees while a long command runs, and where the time went."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
# Seconds between two lines where there is no terminal, and between two looks at the clock. The bars of a terminal are
# drawn that often, too: more often would cost a server that is being measured more than 1 % of a core.
EVERY, POLL = 10.0, 1.0


class _Console(Console):
    """Standard error. It may be closed, or lose its reader, without harm to the work or to standard output."""

    def on_broken_pipe(self) -> None:
        self.quiet = True

    @property
    def has_bars(self) -> bool:
        """Whether lines can be redrawn: on a terminal that is not dumb, whatever FORCE_COLOR says."""
        return sys.stderr is not None and sys.stderr.isatty() and not self.is_dumb_terminal


class Monitor:
    """Shows progress: on a terminal as bars with an ETA, elsewhere as a line every EVERY seconds.

    seconds: phase -> seconds spent in it, without those of the phases inside it.

    Args:
        shown: False keeps it silent.
        clock: returns seconds, and never goes back.
    """

    def __init__(self, shown: bool = True, clock: Callable[[], float] = time.monotonic):
        self.shown, self.clock = shown, clock
        self.seconds: dict[str, float] = {}
        self.console = _Console(stderr=True, quiet=not shown)
        columns = (TextColumn("{task.description:<34}", markup=False), BarColumn(24), MofNCompleteColumn())
        self._phases = Progress(
            *columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=self.console,
            get_time=clock, disable=not shown or not self.console.has_bars, transient=True, refresh_per_second=1 / POLL,
            speed_estimate_period=3600,
            # What is printed above the bars: rich would send it to standard error, even if it is for a file.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )  # fmt: skip
        self._inside = 0.0  # seconds of the phases that have ended within the current one
        self._said = clock()

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show progress until the context ends."""
        if not self.shown or not self._phases.disable:
            with self._phases:
                yield
            return
        self._said, over = self.clock(), Event()

        def watch() -> None:
            while not over.wait(POLL):
                self.tick()

        watcher = Thread(target=watch, daemon=True, name="progress")
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def tick(self) -> None:
        """Print a line about the current work if the last one is EVERY seconds old."""
        now, phases = self.clock(), self._phases.tasks
        if self.shown and phases and now - self._said >= EVERY:
            self._said = now
            self.say("... " + ", ".join(map(_line, phases)))

    @contextmanager
    def phase(self, name: str, total: int | None = None, done: int = 0) -> Iterator[Callable[[], None]]:
        """Time the context's body under `name`. Yields a function to call after each of `total` steps.

        Args:
            done: steps that an earlier run did.
        """
        began, before, self._inside = self.clock(), self._inside, 0.0
        self.seconds.setdefault(name, 0.0)
        task = self._phases.add_task(name, total=total, completed=done, first=done)
        try:
            yield lambda: self._phases.advance(task)
        finally:
            self._phases.remove_task(task)
            taken = self.clock() - began
            self.seconds[name] += taken - self._inside
            self._inside = before + taken

    def steps(self, items: Iterable[T], name: str, total: int, done: int = 0) -> Iterator[T]:
        """Iterate over the steps of a phase that is timed under `name`."""
        with self.phase(name, total, done) as advance:
            for item in items:
                yield item
                advance()

    def layers(self, indices: Iterable[int], total: int) -> Iterator[int]:
        """Iterate over the last decoder layers of `total`; an earlier run did the others."""
        left = list(indices)
        return self.steps(left, "decoder layers", total, total - len(left))

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _line(task: Task) -> str:
    taken, gone = task.elapsed or 0.0, task.completed - task.fields["first"]
    if task.total is None:
        return f"{task.description} ({_clock(taken)})"
    # Not rich's own ETA, which forgets the first step and needs three.
    eta = f", ETA {_clock(taken / gone * (task.total - task.completed))}" if gone else ""
    return f"{task.description} {task.completed:.0f}/{task.total:.0f} ({_clock(taken)}{eta})"


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
