"""Does a server stay healthy under hours of traffic? `python -m benchmarks.soak MODEL --minutes 30`.

Serves MODEL with `vllm serve` and sends it mixed requests from several clients at once: chats and completions, long and
short prompts, streamed or not, and streams that the client abandons. At the end no request may have failed, the server
may not hold more memory than after its warm-up, no abandoned request may still run, and the server must give the same
answers as at the start. The findings include memory over time, which shows a slow leak.
"""

import contextlib
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click
import psutil

from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark.server import Server, api_key, ask, running_server

if TYPE_CHECKING:
    from openai import OpenAI

WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an".split()
QUESTIONS = ("What is the capital of France?", "Name three animals.", "Write a sentence about the sea.", "2 + 2 is")
# After this share of the time the server counts as warm: caches are full, and every batch size has occurred.
WARM_UP = 0.3
# Growth of memory beyond this share of the warm server's is a leak.
GROWTH = 0.005
SERIES_POINTS = 60


@dataclass
class Tally:
    """What the clients did; `errors` holds the first ten messages."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    done: Counter = field(default_factory=Counter)
    tokens: int = 0
    errors: list[str] = field(default_factory=list)

    def add(self, kind: str, tokens: int) -> None:
        with self.lock:
            self.done[kind] += 1
            self.tokens += tokens

    def fail(self, kind: str, error: Exception) -> None:
        with self.lock:
            self.done["failed"] += 1
            if len(self.errors) < 10:
                self.errors.append(f"{kind}: {type(error).__name__}: {error}")


def client_of(server: Server) -> "OpenAI":
    from openai import DefaultHttpxClient, OpenAI

    direct = DefaultHttpxClient(trust_env=False)  # no proxy: the server is on this machine
    return OpenAI(base_url=f"{server.url}/v1", api_key=api_key(), max_retries=0, timeout=600, http_client=direct)


def request(client: "OpenAI", model: str, rng: random.Random, longest: int) -> tuple[str, int]:
    """Send one request of a random kind; returns (kind, tokens received)."""
    kind = rng.choice(("chat", "completion", "streamed", "left"))
    prompt = " ".join(rng.choices(WORDS, k=rng.choice((4, 30, longest // 4))))
    limit = rng.randint(1, longest // 4)
    common = {"model": model, "max_tokens": limit, "temperature": rng.choice((0.0, 1.0))}
    if kind == "chat":
        answer = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **common)
        return kind, answer.usage.completion_tokens
    if kind == "completion":
        return kind, client.completions.create(prompt=prompt, **common).usage.completion_tokens
    stream = client.completions.create(prompt=prompt, stream=True, extra_body={"ignore_eos": True}, **common)
    leave_after = rng.randint(1, limit) if kind == "left" else limit + 1
    received = 0
    with stream:  # leaving the block closes the connection
        for _ in stream:
            received += 1
            if received == leave_after:
                break
    return kind, received


def traffic(server: Server, users: int, seconds: float, longest: int, tally: Tally, watch: Callable[[], None]) -> None:
    """Run `users` clients for `seconds`; `watch` is called every five seconds or more often."""
    end = time.monotonic() + seconds

    def work(seed: int) -> None:
        client, rng = client_of(server), random.Random(seed)
        while time.monotonic() < end:
            try:
                tally.add(*request(client, server.model_name, rng, longest))
            except Exception as error:  # any failed request fails the soak
                tally.fail("request", error)
                time.sleep(1)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(users)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        watch()
        time.sleep(min(5.0, seconds / 10))


def answers(server: Server) -> list[str]:
    """The server's greedy answers to QUESTIONS, one at a time."""
    client = client_of(server)
    common = {"model": server.model_name, "max_tokens": 24, "temperature": 0}
    return [client.completions.create(prompt=text, **common).choices[0].text for text in QUESTIONS]


def running_requests(server: Server) -> float:
    """Requests that run or wait, according to the server's metrics."""
    text = ask(f"{server.url}/metrics", timeout=30).decode()
    counts = re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)$", text, re.MULTILINE)
    return sum(map(float, counts))


def own_memory(server: Server) -> int:
    """Bytes of the server's processes that are neither pages of files nor shared: these do not depend on which other
    processes have loaded the same libraries."""
    total = 0
    for process in server.process.processes() if server.process else ():
        with contextlib.suppress(psutil.Error):  # it has ended
            memory = process.memory_info()
            total += memory.rss - memory.shared
    return total


def series(memory: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """At most SERIES_POINTS pairs (minutes, bytes), each the end and the peak of an equal share of the samples."""
    size = -(-len(memory) // SERIES_POINTS)
    stretches = [memory[i : i + size] for i in range(0, len(memory), size)]
    return [(round(s[-1][0] / 60, 2), max(size for _, size in s)) for s in stretches]


def soak(server: Server, users: int, seconds: float, longest: int, patience: float = 30) -> dict:
    """Send traffic and return the findings; `problems` is empty if all is well.

    Args:
        longest: tokens of the longest request, prompt and answer.
        patience: seconds for the last requests to end.
    """
    answers(server)  # fills the prefix cache, so that the next answers are computed like the last ones
    first = answers(server)
    tally, memory, began = Tally(), [], time.monotonic()
    measure = lambda: memory.append((time.monotonic() - began, own_memory(server)))  # noqa: E731
    traffic(server, users, seconds, longest, tally, measure)
    deadline = time.monotonic() + patience
    while running_requests(server) and time.monotonic() < deadline:
        time.sleep(0.5)
    left, last = running_requests(server), answers(server)
    warm = max(size for at, size in memory if at <= max(WARM_UP * seconds, memory[0][0]))
    end = own_memory(server)
    problems = [f"{tally.done['failed']} requests failed: {tally.errors}"] * bool(tally.done["failed"])
    problems += [f"{left:.0f} requests still run with no client left"] * bool(left)
    problems += [f"memory grew from {warm} to {end} bytes"] * (end > warm * (1 + GROWTH))
    problems += [f"answers changed from {first} to {last}"] * (first != last)
    problems += ["some kind of request was never sent"] * (len(tally.done - Counter(failed=tally.done["failed"])) < 4)
    return {
        "minutes": round((time.monotonic() - began) / 60, 2),
        "users": users,
        "requests": dict(tally.done),
        "tokens_received": tally.tokens,
        "memory_bytes": {"first": memory[0][1], "warm": warm, "peak": max(size for _, size in memory), "end": end},
        "memory_series": series(memory),
        "problems": problems,
    }


@click.command(help=__doc__)
@click.argument("model")
@click.option("--minutes", default=30.0, show_default=True)
@click.option("--users", default=16, show_default=True)
@click.option("--max-model-len", default=1024, show_default=True)
@click.option("--log", default="soak.log", show_default=True, type=click.Path(path_type=Path))
def main(model: str, minutes: float, users: int, max_model_len: int, log: Path) -> None:
    monitor, arguments = Monitor(), ["--max-model-len", str(max_model_len)]
    with monitor.live(), running_server(model, log, arguments, monitor) as server:
        with monitor.phase(f"{minutes:g} minutes of traffic"):
            found = soak(server, users, minutes * 60, max_model_len)
    click.echo(re.sub(r"\[\s+([\d.]+),\s+(\d+)\s+\]", r"[\1, \2]", json.dumps(found, indent=2)))
    sys.exit(bool(found["problems"]))


if __name__ == "__main__":
    main()
