"""`vllm serve`, and what it is asked and told to load over HTTP."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

TRAINERS = ["--weight-transfer-config", '{"backend": "folder"}', "--worker-extension-cls", "weight_updates.Worker"]


def post(url: str, path: str, content: object = None) -> Any:
    body = b"" if content is None else json.dumps(content).encode()
    request = urllib.request.Request(f"{url}{path}", body, {"Content-Type": "application/json"}, method="POST")
    with urllib.request.urlopen(request, timeout=100) as answer:
        return json.loads(answer.read() or "null")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def load(url: str, step: dict[str, Any]) -> str | None:
    """Take a step of `weight_updates.load`.

    Returns:
        The error that has refused it; None if it was done.
    """
    try:
        if "reload" in step:
            post(url, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": step["reload"]}})
        else:
            post(url, "/start_weight_update")
            for piece in range(step["pieces"]):
                post(url, "/update_weights", {"update_info": step | {"piece": piece}})
            if not step.get("left"):
                post(url, "/finish_weight_update", {})
    except urllib.error.HTTPError as error:
        return error.read().decode()
    finally:
        post(url, "/reset_prefix_cache")
    return None


def run(job: dict[str, Any]) -> list[Any]:
    """What a server answers, as `generate` has results: once it has started, and after each of the steps "loads".

    A step has "refused", whether it must be, and perhaps "unasked": then there is None in place of answers. A server of
    dummies is not asked before.
    """
    with _forked(job["model"], job["engine"]) as url:
        results = [] if job["engine"].get("load_format") == "dummy" else [_answers(url, job)]
        for step in job["loads"]:
            error = load(url, step)
            assert (error is not None) == step.get("refused", False), (step, error)
            results.append(None if step.get("unasked") else _answers(url, job))
    return results


def _answers(url: str, job: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for prompt in job["prompts"]:
        asked = {
            "prompt": prompt, "max_tokens": job["tokens"], "temperature": 0, "logprobs": 1, "prompt_logprobs": 1,
            "return_token_ids": True, "ignore_eos": True,
        }  # fmt: skip
        (choice,) = post(url, "/v1/completions", asked)["choices"]
        entries = zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
        found.append({
            "prompt": [entry[str(token)]["logprob"] for token, entry in entries],
            "tokens": choice["token_ids"], "logprobs": choice["logprobs"]["token_logprobs"],
        })  # fmt: skip
    return found


@contextlib.contextmanager
def _forked(model: str, engine: dict[str, Any]) -> Iterator[str]:
    """Yields the URL of a server in a process that is forked from this one, which has imported vLLM."""
    options = [f"--{name.replace('_', '-')}" if value is True else
               f"--{name.replace('_', '-')}={value if isinstance(value, str) else json.dumps(value)}"
               for name, value in engine.items()]  # fmt: skip
    port = free_port()
    process = os.fork()
    if not process:
        from forked import end_with_parent
        from vllm.entrypoints.cli import main

        end_with_parent()
        os.register_at_fork(after_in_child=end_with_parent)  # its engine
        os.setsid()
        os.environ["VLLM_SERVER_DEV_MODE"] = "1"
        context = multiprocessing.get_context("fork")  # on CPUs vLLM takes others, which import it again
        multiprocessing.get_context = lambda method=None: context
        sys.argv = ["vllm", "serve", model, "--host=127.0.0.1", f"--port={port}", *TRAINERS, *options]
        try:
            main.main()
        finally:
            os._exit(1)
    try:
        while True:
            assert os.waitpid(process, os.WNOHANG) == (0, 0), "the server has ended"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
