"""A server: of our own on a free port of this machine, or one that runs already."""

import http.client
import json
import os
import socket
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from ria_vllm.errors import RiaError
from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark.engines import OWNERS, Engine, OpenAi, Vllm, engine_of, is_url
from ria_vllm.serve.benchmark.process import SupervisedProcess

# Not behind the proxies that the environment names.
HERE = ("127.0.0.1", "localhost", "::1", "0.0.0.0")


@dataclass(frozen=True)
class Server:
    """A healthy server.

    Attributes:
        url: without /v1.
        process: None if it ran already.
        startup: seconds.
    """

    url: str
    model_name: str
    process: SupervisedProcess | None
    startup: float
    engine: Engine = field(default_factory=Vllm)

    def memory(self) -> int:
        """Bytes of its process tree; 0 if it ran already."""
        return 0 if self.process is None else self.process.memory()

    def end_of_log(self) -> str:
        return "" if self.process is None else self.process.end_of_log()


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
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    request.add_unredirected_header("Authorization", f"Bearer {api_key()}")  # for this server only
    direct = [urllib.request.ProxyHandler({})] if urlsplit(url).hostname in HERE else []
    with urllib.request.build_opener(*direct).open(request, timeout=timeout) as response:
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


def found_running(url: str) -> Server:
    """The server at a URL. If it has several models, the URL names one behind #.

    Raises:
        RiaError: no answer, or it is not clear which model.
    """
    address, _, wanted = url.partition("#")
    try:
        listed = json.loads(ask(f"{address}/v1/models"))["data"]
        owners = {str(one["id"]): one.get("owned_by") for one in listed if one["id"] == wanted or not one.get("parent")}
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RiaError(
            f"{address}/v1/models: no list of models ({error!r}). Start a server that speaks OpenAI's protocol there; "
            "VLLM_API_KEY is its key."
        ) from None
    found = [name for name in owners if name == (wanted or name)]
    if len(found) != 1:
        raise RiaError(f"{url}: has the models {', '.join(owners) or '(none)'}. Choose one: {address}#MODEL")
    return Server(address, found[0], None, 0.0, OWNERS.get(str(owners[found[0]]), OpenAi)())


@contextmanager
def running_server(model: str, log: Path, arguments: Sequence[str], monitor: Monitor) -> Iterator[Server]:
    """`vllm serve MODEL`, or llama.cpp of a .gguf file: healthy when the block starts, gone when it ends. Of a URL the
    server that runs there, and goes on.

    Args:
        log: file for the server's output.
        arguments: more of `vllm serve` or `llama-server`.
        monitor: shows that the server is starting.

    Raises:
        RiaError: the server ended while starting; quotes the end of its log.
    """
    if is_url(model):
        yield found_running(model)
        return
    port, engine = free_port(), engine_of(model)
    assert not isinstance(engine, OpenAi)
    url = f"http://127.0.0.1:{port}"
    command = engine.command(model, port, arguments)
    began = time.monotonic()
    with SupervisedProcess(command, log) as process:
        with monitor.phase("waiting for the server to start"):
            while not healthy(url):
                if time.monotonic() - began > PATIENCE:
                    raise RiaError(f"The server of {model} has not started in {PATIENCE} s. {process.end_of_log()}")
                if not process.running:
                    raise RiaError(f"The server of {model} ended while starting. {process.end_of_log()}")
                time.sleep(0.5)
        yield Server(url, model, process, time.monotonic() - began, engine)
