"""What a user sees while a long command runs, and where the time went."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import Event, Thread
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
# Seconds between two lines where there is no terminal, and between two looks at the clock. The bars of a terminal are
# drawn that often, too: more often would cost a server that is being measured more than 1 % of a core.
EVERY, POLL = 10.0, 1.0


@dataclass(eq=False)
class _Stage:
    """Work that takes time. If it has steps, `total` counts them, and `first` were done before it began."""

    name: str
    began: float
    total: int | None = None
    done: int = 0
    first: int = 0

    def line(self, now: float) -> str:
        taken = now - self.began
        if self.total is None:
            return f"{self.name} ({_clock(taken)})"
        gone, left = self.done - self.first, self.total - self.done
        eta = f", ETA {_clock(taken / gone * left)}" if gone else ""
        return f"{self.name} {self.done}/{self.total} ({_clock(taken)}{eta})"


class _Console(Console):
    """Standard error. It may be closed, or lose its reader, without harm to the work or to standard output."""

    def on_broken_pipe(self) -> None:
        self.quiet = True

    @property
    def has_bars(self) -> bool:
        """Whether lines can be redrawn: on a terminal that is not dumb, whatever FORCE_COLOR says."""
        return sys.stderr is not None and sys.stderr.isatty() and not self.is_dumb_terminal


class Monitor:
    """Shows progress: on a terminal as two bars with an ETA (all layers, the current phase), elsewhere as a line every
    EVERY seconds.

    seconds: phase -> seconds spent in it, without those of the phases inside it.

    Args:
        shown: False on every rank but the first, which keeps them silent.
        clock: returns seconds, and never goes back.
    """

    def __init__(self, shown: bool = True, clock: Callable[[], float] = time.monotonic):
        self.shown, self.clock = shown, clock
        self.seconds: dict[str, float] = {}
        self.console = _Console(stderr=True, quiet=not shown)
        columns = (TextColumn("{task.description:<34}", markup=False), BarColumn(24), MofNCompleteColumn())
        self.bars = Progress(
            *columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=self.console,
            disable=not shown or not self.console.has_bars, transient=True, refresh_per_second=1 / POLL,
            # What is printed above the bars: rich would send it to standard error, even if it is for a file.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )  # fmt: skip
        self._stack: list[_Stage] = []
        self._since = clock()
        self._layers: _Stage | None = None
        self._layers_bar = self.bars.add_task("decoder layers", visible=False)
        self._bar = self.bars.add_task("", total=None, visible=False)
        self._said = clock()

    @contextmanager
    def live(self, bars: bool = True) -> Iterator[None]:
        """Show progress until the context ends.

        Args:
            bars: False while another program draws bars of its own; a terminal then shows those only.
        """
        if not self.shown or not self.bars.disable:
            with self.bars if bars else nullcontext():
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
        now = self.clock()
        stages = [stage for stage in (self._layers, *self._stack) if stage is not None]
        if self.shown and stages and now - self._said >= EVERY:
            self._said = now
            self.say("... " + ", ".join(stage.line(now) for stage in stages))

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """Time the context's body under `name`. Yields a function to call after each of `total` steps."""
        self._book()
        stage = _Stage(name, self.clock(), total)
        self._stack.append(stage)
        self._show()

        def advance() -> None:
            stage.done += 1
            if self._current() is stage:
                self.bars.update(self._bar, completed=stage.done)

        try:
            yield advance
        finally:
            self._book()
            self._stack.remove(stage)
            self._show()

    def _book(self) -> None:
        now = self.clock()
        if self._stack:
            name = self._stack[-1].name
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def _current(self) -> _Stage | None:
        """The stage that the second bar shows: the innermost one that has steps, else the innermost one."""
        stages = [stage for stage in self._stack if stage.total is not None] or self._stack
        return stages[-1] if stages else None

    def _show(self) -> None:
        if self.bars.disable:
            return
        stage, bar = self._current(), self.bars.tasks[1]
        if stage is None:
            self.bars.update(self._bar, visible=False)
        elif bar.fields.get("stage") is not stage:
            name = "  " * (self._layers is not None) + stage.name
            bar.total = stage.total  # reset() would keep the old total where this one is unknown
            self.bars.reset(self._bar, completed=stage.done, description=name, visible=True, stage=stage)

    def layers(self, indices: Iterable[int], total: int) -> Iterator[int]:
        """Iterate over decoder layers; the bar starts at the first of `indices`."""
        indices = list(indices)
        first = total - len(indices)
        self.bars.reset(self._layers_bar, total=total, completed=first, visible=True)
        self._layers = _Stage("decoder layers", self.clock(), total, first, first)
        try:
            for index in indices:
                yield index
                self._layers.done += 1
                self.bars.advance(self._layers_bar)
        finally:
            self.bars.update(self._layers_bar, visible=False)
            self._layers = None

    def steps(self, items: Iterable[T], name: str, total: int) -> Iterator[T]:
        """Iterate over the steps of a phase that is timed under `name`."""
        with self.phase(name, total) as advance:
            for item in items:
                yield item
                advance()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
