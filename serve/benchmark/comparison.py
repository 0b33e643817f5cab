"""A whole benchmark: every side in every repetition, in turn."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import psutil

from ria_vllm.errors import RiaError
from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark import load, table
from ria_vllm.serve.benchmark.load import Outcome, Workload
from ria_vllm.serve.benchmark.machine import machine
from ria_vllm.serve.benchmark.quality import Incomparable, TextQuality
from ria_vllm.serve.benchmark.redaction import hidden
from ria_vllm.serve.benchmark.results import Measured, Run, Side
from ria_vllm.serve.benchmark.server import Server, caches_prefixes, existing_server, running_server
from ria_vllm.sizes import human_size


@dataclass
class Comparison:
    """A whole benchmark: what to measure, and what has been measured so far.

    By default one server is alive at a time: each repetition starts every side's server once, and the side that goes
    first changes. With `keep_servers` all are alive, only one of them gets requests, and sides alternate at every load.

    Attributes:
        tokenizer: the folder whose tokenizer makes the prompts, the same for all sides.
        concurrency: numbers of users; empty for offline measurements.
        text: what perplexity and divergence are measured on, after the first loads of each side.
        serve_arguments: for `vllm serve`, or offline for `vllm bench throughput`.
        urls: side -> URL of a running server; sides without one get a server of their own.
        startup_timeout: seconds.
    """

    sides: Sequence[Side]
    workload: Workload
    concurrency: Sequence[int]
    repetitions: int
    seed: int
    folder: Path
    tokenizer: str
    text: TextQuality | None = None
    keep_servers: bool = False
    serve_arguments: Sequence[str] = ()
    options: dict[str, object] = field(default_factory=dict)
    urls: dict[str, str] = field(default_factory=dict)
    startup_timeout: float = 1800
    say: Callable[[str], None] = click.echo
    monitor: Monitor = field(default_factory=Monitor)
    measured: Measured = field(init=False)

    def __post_init__(self) -> None:
        shown = [replace(side, arguments=tuple(hidden(side.arguments))) for side in self.sides]
        self.measured = Measured(shown)

    def measure(self) -> None:
        """Measure all sides in every repetition; save the results after every run.

        Raises:
            RiaError: a server of a pair cannot start, or a text cannot be compared.
        """
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self._save(complete=False)
        with self.monitor.live():
            if not (self.keep_servers and self.concurrency and self._all_alive()):
                self._one_alive()
        self._save(complete=True)

    def _order(self, repetition: int) -> list[Side]:
        """The sides, rotated: each goes first in one of as many repetitions."""
        first = repetition % len(self.sides)
        return [*self.sides[first:], *self.sides[:first]]

    def _one_alive(self) -> None:
        broken: set[str] = set()
        for repetition in range(self.repetitions):
            for side in self._order(repetition):
                if side.name in broken:
                    continue
                if not self.concurrency:
                    self._offline(side, repetition)
                elif not self._online(side, repetition):
                    broken.add(side.name)

    def _online(self, side: Side, repetition: int) -> bool:
        """One repetition with a server of its own; False, with the failure on record, if the server did not start.

        Raises:
            RiaError: it did not start, and nothing would be left to compare.
        """
        with ExitStack() as stack:
            try:
                server = self._start(stack, side, repetition)
            except Incomparable:
                raise
            except RiaError as error:
                if len(self.sides) == 2:
                    raise
                failure = Outcome(None, str(error).splitlines()[0])
                for users in self.concurrency:
                    self._record(Run(side.name, repetition, users, failure), f"{side.name}, {users} users")
                return False
            for number in range(len(self.concurrency)):
                self._load(server, side, repetition, number)
            if repetition == 0:
                self._quality(server, side)
        return True

    def _all_alive(self) -> bool:
        """All repetitions with all servers alive; False, with nothing measured, if they do not fit together."""
        with ExitStack() as stack:
            servers: dict[str, Server] = {}
            for side in self.sides:
                largest = max((s.process.memory() for s in servers.values() if s.process), default=0)
                available = psutil.virtual_memory().available
                if available < 1.2 * largest:
                    left = f"{human_size(available)} of memory are left, and one takes {human_size(largest)}"
                    return self._not_all(f"with {len(servers)} alive, {left}")
                try:
                    server = self._start(stack, side, 0)
                except Incomparable:
                    raise
                except RiaError as error:
                    if servers:  # it may start alone
                        return self._not_all(f"beside others, {str(error).splitlines()[0]}")
                    raise
                servers[side.name] = server
            for repetition in range(self.repetitions):
                for number in range(len(self.concurrency)):
                    for side in self._order(repetition):
                        self._load(servers[side.name], side, repetition, number)
            for side in self.sides:
                self._quality(servers[side.name], side)
        return True

    def _not_all(self, reason: str) -> bool:
        self._note(f"One server at a time, although all were asked for: {reason}.")
        return False

    def _start(self, stack: ExitStack, side: Side, repetition: int) -> Server:
        """The side's server, which ends with `stack`.

        Raises:
            RiaError: it did not start.
            Incomparable: its tokens cannot be compared.
        """
        name = self._name(side, repetition)
        self.say(f"{name}: {'using ' + self.urls[side.name] if side.name in self.urls else 'starting vllm serve'}")
        with self.monitor.phase(name):
            server = stack.enter_context(self._server(side, repetition))
        if server.startup is not None:
            self.say(f"{name}: ready after {server.startup:.0f} s")
        if repetition == 0:
            if side.name in self.urls and caches_prefixes(server.url):
                self._note(
                    f"{side.name}: the server at {server.url} has a prefix cache. It answers prompts that it has seen "
                    "sooner: that of the warm-up, and all of an earlier benchmark with the same --seed. Start it with "
                    "--no-enable-prefix-caching."
                )
            if self.text is not None:
                self.text.check(side.name, server)
        return server

    def _note(self, note: str) -> None:
        if note not in self.measured.notes:
            self.measured.notes.append(note)
            self.say(f"warning: {note}")

    def _load(self, server: Server, side: Side, repetition: int, number: int) -> None:
        # Each load has its own prompts, or the prefix cache would answer them. All sides get the same ones.
        users, seed = self.concurrency[number], self.seed + 1000 * repetition + number
        log = self._log(f"{side.name}-{repetition + 1}-users{users}")
        with self.monitor.phase(self._name(side, repetition)):
            outcome = load.online(server, self.tokenizer, self.workload, users, seed, log, self.monitor)
        self._record(Run(side.name, repetition, users, outcome), f"{self._name(side, repetition)}, {users} users")

    def _quality(self, server: Server, side: Side) -> None:
        """Perplexity and divergence. They come after the loads, whose peak of memory they must not raise."""
        if self.text is None:
            return
        try:
            with self.monitor.phase(f"{side.name}: perplexity"):
                found = self.text.measure(side.name, server, self.monitor)
        except RiaError as error:
            self.measured.quality_failures[side.name] = str(error)
            self.say(f"{side.name}: perplexity FAILED")
        else:
            self.measured.quality[side.name] = found
            kl = "" if found.kl is None else f", KL {found.kl:.4g}"
            self.say(f"{side.name}: perplexity {found.perplexity:.4g}{kl}")
        self._save(complete=False)

    def _offline(self, side: Side, repetition: int) -> None:
        name = f"{self._name(side, repetition)}, offline"
        self.say(f"{name}: running vllm bench throughput")
        log = self._log(f"{side.name}-{repetition + 1}-offline")
        requests, seed = self.workload.requests_per_user, self.seed + 1000 * repetition
        arguments = [*self.serve_arguments, *side.arguments]
        with self.monitor.phase(name):
            outcome = load.offline(side.model, self.workload, requests, seed, log, arguments, self.monitor)
        self._record(Run(side.name, repetition, None, outcome), name)

    def _server(self, side: Side, repetition: int) -> AbstractContextManager[Server]:
        if side.name in self.urls:
            return borrowed(self.urls[side.name])
        log = self._log(f"{side.name}-{repetition + 1}-server")
        arguments = [*self.serve_arguments, *side.arguments]
        return running_server(side.model, log, arguments, self.startup_timeout, self.monitor)

    def _name(self, side: Side, repetition: int) -> str:
        return f"repetition {repetition + 1}/{self.repetitions}, {side.name}"

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _record(self, run: Run, name: str) -> None:
        self.measured.runs.append(run)
        figures = run.outcome.figures
        self.say(f"{name}: {figures['output_tokens_per_s']:.4g} output tokens/s" if figures else f"{name}: FAILED")
        self._save(complete=False)

    def _save(self, complete: bool) -> None:
        options = {
            "input_len": None if self.workload.data else self.workload.input_len,
            "data": str(self.workload.data) if self.workload.data else None,
            "output_len": self.workload.output_len,
            "requests_per_user": self.workload.requests_per_user,
            "repetitions": self.repetitions,
            "seed": self.seed,
            "serve_arguments": " ".join(hidden(self.serve_arguments)),
        }
        table.write(self.folder, self.measured, machine(), options | self.options, complete)


@contextmanager
def borrowed(url: str) -> Iterator[Server]:
    """A running server, which is left running."""
    yield existing_server(url)
