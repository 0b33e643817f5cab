"""A `vllm serve` of our own on a free port, or a server that already runs."""

import json
import socket
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ria_vllm.errors import RiaError
from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark.process import SupervisedProcess, wait_until

VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


@dataclass(frozen=True)
class Server:
    """A healthy server.

    Attributes:
        url: without /v1.
        process, startup: None for a server that we did not start; startup in seconds.
    """

    url: str
    model_name: str
    process: SupervisedProcess | None
    startup: float | None


LOCAL = ("127.0.0.1", "localhost", "::1")
# Ignores the proxies that the environment names: a server on this machine is not behind them.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str, timeout: float) -> bytes:
    """The body of a GET request, without a proxy for a server on this machine. timeout: seconds."""
    local = urllib.parse.urlsplit(url).hostname in LOCAL
    with (_DIRECT.open if local else urllib.request.urlopen)(url, timeout=timeout) as response:
        return response.read()


def post(url: str, content: object, timeout: float) -> Any:
    """The JSON answer to a POST request with JSON, without a proxy for a server on this machine. timeout: seconds."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(content).encode(), headers)
    local = urllib.parse.urlsplit(url).hostname in LOCAL
    with (_DIRECT.open if local else urllib.request.urlopen)(request, timeout=timeout) as response:
        return json.loads(response.read())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def healthy(url: str) -> bool:
    try:
        get(f"{url}/health", timeout=5)
        return True
    except OSError:
        return False


def caches_prefixes(url: str) -> bool:
    """Whether a server says that it has a prefix cache; False if it does not say."""
    try:
        lines = get(f"{url}/metrics", timeout=10).decode(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.startswith("vllm:cache_config_info{") and 'enable_prefix_caching="True"' in line for line in lines)


def served_name(url: str) -> str:
    """The name of the first model that a server offers.

    Raises:
        RiaError: no OpenAI-compatible server there.
    """
    try:
        return json.loads(get(f"{url}/v1/models", timeout=10))["data"][0]["id"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RiaError(f"{url}: no OpenAI-compatible server responds ({error}).") from None


@contextmanager
def running_server(
    model: str,
    log: Path,
    arguments: Sequence[str] = (),
    timeout: float = 1800,
    monitor: Monitor | None = None,
) -> Iterator[Server]:
    """`vllm serve MODEL`: healthy when the block starts, gone when it ends.

    Args:
        log: file for the server's output.
        arguments: more of `vllm serve`.
        timeout: seconds to wait until it is healthy.
        monitor: shows that the server is starting.

    Raises:
        RiaError: the server ended or was not healthy in time; quotes the end of its log.
    """
    monitor = monitor or Monitor(shown=False)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [*VLLM, "serve", model, "--host", "127.0.0.1", "--port", str(port), *arguments]
    began = time.monotonic()
    with SupervisedProcess(command, log) as process:
        with monitor.phase("waiting for the server to start"):
            ready = wait_until(lambda: healthy(url), process, timeout)
        if not ready:
            state = f"was not healthy after {timeout:.0f} s" if process.running else "ended while starting"
            raise RiaError(f"vllm serve {model} {state}. The end of {log}:\n{process.log_tail()}")
        yield Server(url, served_name(url), process, time.monotonic() - began)


def existing_server(url: str) -> Server:
    """A running server; `url` with or without /v1."""
    url = url.rstrip("/").removesuffix("/v1")
    return Server(url, served_name(url), None, None)
