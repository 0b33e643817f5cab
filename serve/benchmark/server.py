"""A server of our own on a free port of this machine."""

import json
import os
import socket
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ria_vllm.errors import RiaError
from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark.engines import engine_of
from ria_vllm.serve.benchmark.process import SupervisedProcess

# Ignores the proxies that the environment names: a server on this machine is not behind them.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Server:
    """A healthy server.

    Attributes:
        url: without /v1.
        startup: seconds.
    """

    url: str
    model_name: str
    process: SupervisedProcess
    startup: float


# Seconds for a start, downloads included.
PATIENCE = 3600


def api_key() -> str:
    """The key of VLLM_API_KEY, which `vllm serve` asks for if that is set; else one that no server looks at.

    Raises:
        RiaError: it cannot be sent.
    """
    key = os.environ.get("VLLM_API_KEY") or "none"
    if not (key.isascii() and key.isprintable()):
        raise RiaError("VLLM_API_KEY has characters that no request can carry, perhaps a newline at its end.")
    return key


def ask(url: str, content: object = None, timeout: float = 10) -> bytes:
    """The body of the answer to a GET request, or with `content` to a POST request with JSON. timeout: seconds.

    Raises:
        OSError, http.client.HTTPException: no answer, or one with an HTTP error.
    """
    headers = {"Authorization": f"Bearer {api_key()}", "Content-Type": "application/json"}
    body = None if content is None else json.dumps(content).encode()
    with _DIRECT.open(urllib.request.Request(url, body, headers), timeout=timeout) as response:
        return response.read()


def healthy(url: str) -> bool:
    try:
        ask(f"{url}/health")
        return True
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running_server(model: str, log: Path, arguments: Sequence[str], monitor: Monitor) -> Iterator[Server]:
    """`vllm serve MODEL`, or llama.cpp of a .gguf file: healthy when the block starts, gone when it ends.

    Args:
        log: file for the server's output.
        arguments: more of `vllm serve` or `llama-server`.
        monitor: shows that the server is starting.

    Raises:
        RiaError: the server ended while starting; quotes the end of its log.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = engine_of(model).command(model, port, arguments)
    began = time.monotonic()
    with SupervisedProcess(command, log) as process:
        with monitor.phase("waiting for the server to start"):
            while not healthy(url):
                if time.monotonic() - began > PATIENCE:
                    raise RiaError(f"The server of {model} has not started in {PATIENCE} s. {process.end_of_log()}")
                if not process.running:
                    raise RiaError(f"The server of {model} ended while starting. {process.end_of_log()}")
                time.sleep(0.5)
        yield Server(url, model, process, time.monotonic() - began)
