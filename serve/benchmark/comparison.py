"""A whole benchmark: every side in every repetition, in turn."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark import load, results
from ria_vllm.serve.benchmark.engines import engine_of, is_url
from ria_vllm.serve.benchmark.load import Workload
from ria_vllm.serve.benchmark.quality import TextQuality, Unanswered
from ria_vllm.serve.benchmark.results import Measured, Run
from ria_vllm.serve.benchmark.server import Server, running_server
from ria_vllm.serve.benchmark.sides import Side


@dataclass
class Comparison:
    """What to measure, and what has been measured so far.

    One server is alive at a time: each repetition starts every side's server once, and the side that goes first
    changes, so that a machine that slows down does not slow the same side.

    Attributes:
        tokenizer: the folder whose tokenizer makes the prompts, the same for all sides.
        concurrency: numbers of users.
        serve_arguments: for every `vllm serve`.
        text: what perplexity and divergence are measured on, after the first loads of each side.
        options: what the results say of the measurement.
    """

    sides: Sequence[Side]
    workload: Workload
    concurrency: Sequence[int]
    repetitions: int
    folder: Path
    tokenizer: str
    serve_arguments: Sequence[str] = ()
    text: TextQuality | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    monitor: Monitor = field(default_factory=Monitor)

    def __post_init__(self) -> None:
        self.measured = Measured(self.sides)

    def measure(self) -> None:
        """Measure all sides in every repetition; save the results after every run.

        Raises:
            RiaError: a server does not start, a request fails, or a text cannot be measured.
        """
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        with self.monitor.live():
            for repetition in range(self.repetitions):
                first = repetition % len(self.sides)
                for side in [*self.sides[first:], *self.sides[:first]]:
                    self._serve(side, repetition)

    def _serve(self, side: Side, repetition: int) -> None:
        """Start a side's server unless it runs already, load it with each number of users, and end it."""
        name = f"repetition {repetition + 1}/{self.repetitions}, {side.name}"
        # Some more tokens than asked for, as llama.cpp splits prompts again.
        tokens = max(self.workload.most_tokens() + 64, self.text.seq_len + 2 if self.text else 0)
        shared = engine_of(side.model).arguments(self.serve_arguments, max(self.concurrency), tokens)
        arguments = [*shared, *side.arguments]
        logs = self.folder / "logs" / f"{side.name}-{repetition + 1}"
        click.echo(f"{name}: {'its server runs already' if is_url(side.model) else 'starting its server'}")
        with (
            self.monitor.phase(name),
            running_server(side.model, Path(f"{logs}-server.log"), arguments, self.monitor) as server,
        ):
            if server.process is not None:
                click.echo(f"{name}: ready after {server.startup:.0f} s")
            text = self._text_for(side, server) if repetition == 0 else None
            for number, users in enumerate(self.concurrency):
                # Each load has its own prompts. All sides get the same ones.
                seed, log = 1000 * repetition + number, Path(f"{logs}-users{users}.log")
                figures = load.online(server, self.tokenizer, self.workload, users, seed, log, self.monitor)
                click.echo(f"{name}, {users} users: {figures[results.SPEED]:.4g} output tokens/s")
                self.measured.runs.append(Run(side.name, repetition, users, figures))
                results.write(self.folder, self.measured, self.options)
            if text is not None:  # after the loads, whose peak of memory it must not raise
                with self._optional(side, server):
                    found = text.measure(side.name, server, self.monitor)
                    click.echo(f"{side.name}: perplexity {found.perplexity:.4g}, KL {found.kl:.4g}")
                    self.measured.quality[side.name] = found
                    results.write(self.folder, self.measured, self.options)

    def _text_for(self, side: Side, server: Server) -> TextQuality | None:
        """The text if this side can be measured on it."""
        if self.text is not None:
            with self._optional(side, server):
                self.text.check(side.name, server)
                return self.text
        return None

    @contextmanager
    def _optional(self, side: Side, server: Server) -> Iterator[None]:
        """A server that ran already may not answer: then only its quality is left out."""
        try:
            yield
        except Unanswered as error:
            if server.process is not None or side is self.sides[0]:
                raise
            click.echo(f"{' '.join(str(error).split())} Its perplexity and KL are left out.")
