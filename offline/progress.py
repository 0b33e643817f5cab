"""What a user sees while a model is compressed, and where the time went."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


class Monitor:
    """Two bars with an ETA each: all layers, and the phase at hand. Silent on every rank but the first.

    seconds: phase -> time spent in it; a phase inside another one counts for itself alone.
    """

    def __init__(self, shown: bool = True):
        self.shown = shown
        self.seconds: dict[str, float] = {}
        self.console = Console(file=sys.stderr, quiet=not shown)
        columns = (TextColumn("{task.description:<34}"), BarColumn(24), MofNCompleteColumn())
        self.bars = Progress(
            *columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=self.console,
            disable=not shown or not self.console.is_terminal, transient=True,
        )
        self._stack: list[str] = []
        self._since = time.perf_counter()
        self._layers = None

    @contextmanager
    def live(self) -> Iterator[None]:
        with self.bars:
            yield

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._book()
        self._stack.append(name)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def _book(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] = self.seconds.get(self._stack[-1], 0.0) + now - self._since
        self._since = now

    def layers(self, indices: Iterable[int], total: int) -> Iterator[int]:
        """Go through the decoder layers; the bar starts at the first one given."""
        indices = list(indices)
        task = self.bars.add_task("decoder layers", total=total, completed=total - len(indices))
        for index in indices:
            yield index
            self.bars.advance(task)

    def steps(self, items: Iterable[T], name: str, total: int) -> Iterator[T]:
        """Go through the steps of a phase, which is timed under `name`."""
        task = self.bars.add_task("  " + name, total=total)
        try:
            with self.phase(name):
                for item in items:
                    yield item
                    self.bars.advance(task)
        finally:
            self.bars.remove_task(task)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)
