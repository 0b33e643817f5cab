"""A `vllm serve` of our own on a free port, or one that runs already."""

import json
import socket
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ria_vllm.errors import RiaError
from ria_vllm.serve.benchmark.process import SupervisedProcess, wait_until

VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


@dataclass(frozen=True)
class Server:
    """url without the /v1; process is None for a server that we did not start; startup in seconds likewise."""

    url: str
    model_name: str
    process: SupervisedProcess | None
    startup: float | None


# Whatever proxy the environment names: our own server is not behind it.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str, timeout: float) -> bytes:
    """The body of a GET; a server on this machine is asked directly."""
    local = urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    with (_DIRECT.open if local else urllib.request.urlopen)(url, timeout=timeout) as answer:
        return answer.read()


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


def served_name(url: str) -> str:
    """The first model that a server offers."""
    try:
        return json.loads(get(f"{url}/v1/models", timeout=10))["data"][0]["id"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RiaError(f"{url}: no OpenAI-compatible server answers there ({error}).") from None


@contextmanager
def running_server(
    model: str,
    log: Path,
    arguments: Sequence[str] = (),
    timeout: float = 1800,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Server]:
    """`vllm serve MODEL`, from healthy until the block ends.

    Raises:
        RiaError: it ends or stays silent before it is healthy; with the end of its log.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [*VLLM, "serve", model, "--host", "127.0.0.1", "--port", str(port), *arguments]
    began = time.monotonic()
    with SupervisedProcess(command, log) as process:
        said = began

        def ready() -> bool:
            nonlocal said
            if time.monotonic() - said > 15:
                said = time.monotonic()
                say(f"still starting after {said - began:.0f} s")
            return healthy(url)

        if not wait_until(ready, process, timeout):
            state = f"was not healthy after {timeout:.0f} s" if process.running else "ended while starting"
            raise RiaError(f"vllm serve {model} {state}. The end of {log}:\n{process.log_tail()}")
        yield Server(url, served_name(url), process, time.monotonic() - began)


def existing_server(url: str) -> Server:
    url = url.rstrip("/").removesuffix("/v1")
    return Server(url, served_name(url), None, None)
