"""One measurement by `vllm bench serve` or `vllm bench throughput`, and when its result can be trusted."""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ria_vllm.progress import POLL, Monitor
from ria_vllm.serve.benchmark.process import PeakMemory, SupervisedProcess
from ria_vllm.serve.benchmark.server import VLLM, Server

# Our names of figures -> the names in the results of `vllm bench serve`.
ONLINE_FIGURES = {
    "output_tokens_per_s": "output_throughput",
    "requests_per_s": "request_throughput",
    "ttft_p50_ms": "p50_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "tpot_p50_ms": "p50_tpot_ms",
    "tpot_p99_ms": "p99_tpot_ms",
}


# The progress bar of `vllm bench serve` after its warm-up: requests that are answered, of all.
MAIN_RUN, ANSWERED = b"Starting main benchmark run", re.compile(rb"(\d+)/\d+ \[")


@dataclass(frozen=True)
class Workload:
    """The requests of every run.

    Attributes:
        input_len, output_len: tokens.
        data: a ShareGPT-style JSON file, or None for random prompts of `input_len` tokens.
    """

    input_len: int
    output_len: int
    requests_per_user: int
    data: Path | None = None

    def requests(self, users: int) -> int:
        return users * self.requests_per_user

    def dataset_arguments(self) -> list[str]:
        if self.data is not None:
            output = ["--sharegpt-output-len", str(self.output_len)]
            return ["--dataset-name", "sharegpt", "--dataset-path", str(self.data), *output]
        lengths = ["--random-input-len", str(self.input_len), "--random-output-len", str(self.output_len)]
        return ["--dataset-name", "random", *lengths]


@dataclass(frozen=True)
class Outcome:
    """Either the figures of one run or the reason why there are none.

    Attributes:
        memory: bytes at the peak, None if unknown.
    """

    figures: dict[str, float] | None
    failure: str | None
    memory: int | None = None


def failed(reason: str, process: SupervisedProcess | None = None) -> Outcome:
    return Outcome(None, reason if process is None else f"{reason} (see {process.log})")


def online(
    server: Server,
    tokenizer: str,
    workload: Workload,
    concurrency: int,
    seed: int,
    log: Path,
    monitor: Monitor,
    timeout: float = 3600,
) -> Outcome:
    """Load a server with `concurrency` users, each of whom sends the next request when the last one is answered."""
    requests = workload.requests(concurrency)
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    command = [*VLLM, "bench", "serve", "--backend", "openai", "--base-url", server.url]
    command += ["--endpoint", "/v1/completions"]
    command += ["--model", tokenizer, "--served-model-name", server.model_name, "--tokenizer", tokenizer]
    command += [*workload.dataset_arguments(), "--num-prompts", str(requests), "--seed", str(seed), "--ignore-eos"]
    command += ["--max-concurrency", str(concurrency), "--num-warmups", str(concurrency), "--temperature", "0"]
    command += ["--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,99"]
    command += ["--save-result", "--save-detailed", "--result-dir", str(result.parent)]
    command += ["--result-filename", result.name]
    memory = None
    # Its lines come at once, and its bar moves once a second: it costs the measurement nothing.
    environment = {**no_proxy_on_this_machine(), "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "1"}
    users = f"{concurrency} user{'s' * (concurrency > 1)}"
    with (
        SupervisedProcess(command, log, environment) as client,
        monitor.phase(f"requests of {users} answered", requests) as advance,
    ):
        if server.process is None:
            status = wait(client, timeout, advance)
        else:
            with PeakMemory(server.process) as sampled:
                status = wait(client, timeout, advance)
            memory = sampled.peak
            if not server.process.running:
                return failed(f"the server ended during the run (see {server.process.log})")
        if status is None:
            return failed(f"not finished after {timeout:.0f} s", client)
        if status != 0:
            return failed(f"vllm bench serve ended with status {status}", client)
        expected = requests * workload.output_len
        wrong, figures = read_online(result, requests, expected)
        if wrong:
            return failed(wrong, client)
    return Outcome(figures, None, memory)


def wait(client: SupervisedProcess, timeout: float, advance: Callable[[], None]) -> int | None:
    """What `client.wait` returns; meanwhile `advance` is called once for each request that has been answered."""
    deadline, counted = time.monotonic() + timeout, 0
    while True:
        left = deadline - time.monotonic()
        status = client.wait(max(0.0, min(left, POLL)))
        if status is not None or left <= 0:
            return status
        found = answered(client.log)
        for _ in range(found - counted):
            advance()
        counted = max(counted, found)


def answered(log: Path) -> int:
    """How many requests have been answered, as the log of `vllm bench serve` has it; 0 if it does not say."""
    found = ANSWERED.findall(log.read_bytes().partition(MAIN_RUN)[2])
    return int(found[-1]) if found else 0


def no_proxy_on_this_machine() -> dict[str, str]:
    """Environment variables that keep a client from using a proxy for a server on this machine."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = ",".join([*filter(None, [given]), "127.0.0.1", "localhost"])
    return {"no_proxy": hosts, "NO_PROXY": hosts}


def read_online(result: Path, requests: int, output_tokens: int) -> tuple[str | None, dict[str, float] | None]:
    """(None, figures) of a result file, or (reason, None) if a request failed or its answer was too short."""
    try:
        content = json.loads(result.read_text())
    except (OSError, ValueError) as error:
        return f"no readable result: {error}", None
    errors = [error for error in content.get("errors", []) if error]
    if errors:
        return f"{len(errors)} of {requests} requests failed, the first with: {str(errors[0])[:300]}", None
    if content.get("completed") != requests or content.get("failed"):
        return f"{content.get('completed')} of {requests} requests completed", None
    if content.get("total_output_tokens") != output_tokens:
        return f"{content.get('total_output_tokens')} output tokens instead of {output_tokens}", None
    return numbers(content, ONLINE_FIGURES)


def numbers(content: dict[str, Any], names: dict[str, str]) -> tuple[str | None, dict[str, float] | None]:
    """(None, figures by our names), or (reason, None) if one is not a finite number of at least 0.

    Args:
        names: our names -> the result's.
    """
    figures = {}
    for ours, theirs in names.items():
        value = content.get(theirs)
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            return f"the result has no usable {theirs}", None
        figures[ours] = float(value)
    return None, figures


def offline(
    model: str,
    workload: Workload,
    requests: int,
    seed: int,
    log: Path,
    arguments: Sequence[str],
    monitor: Monitor,
    timeout: float = 7200,
) -> Outcome:
    """Run all requests at once by `vllm bench throughput`, without a server."""
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    command = [*VLLM, "bench", "throughput", "--model", model, "--num-prompts", str(requests), "--seed", str(seed)]
    if workload.data is None:
        command += workload.dataset_arguments()
    else:  # the option's name differs from that of `bench serve`
        command += ["--dataset-name", "sharegpt", "--dataset-path", str(workload.data)]
        command += ["--output-len", str(workload.output_len)]
    command += ["--output-json", str(result), *arguments]
    with SupervisedProcess(command, log) as process, monitor.phase("waiting for vllm bench throughput"):
        with PeakMemory(process) as sampled:
            status = process.wait(timeout)
        if status is None:
            return failed(f"not finished after {timeout:.0f} s", process)
        if status != 0:
            return failed(f"vllm bench throughput ended with status {status}", process)
        try:
            content = json.loads(result.read_text())
        except (OSError, ValueError) as error:
            return failed(f"no readable result: {error}", process)
        if content.get("num_requests") != requests:
            return failed(f"{content.get('num_requests')} of {requests} requests completed", process)
        names = {"requests_per_s": "requests_per_second", "total_tokens_per_s": "tokens_per_second"}
        wrong, figures = numbers(content, names)
        if wrong or figures is None:
            return failed(str(wrong), process)
    figures["output_tokens_per_s"] = figures["requests_per_s"] * workload.output_len
    return Outcome(figures, None, sampled.peak)
