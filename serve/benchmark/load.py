"""One measurement by `vllm bench serve`, and when its result can be trusted."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ria_vllm.errors import RiaError
from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark.engines import VLLM
from ria_vllm.serve.benchmark.process import SupervisedProcess
from ria_vllm.serve.benchmark.server import HERE, Server, api_key

# Figures of `vllm bench serve`, by its names -> titles of columns.
REPORTED = {
    "output_throughput": "output tok/s",
    "request_throughput": "requests/s",
    "p50_ttft_ms": "TTFT p50 ms",
    "p99_ttft_ms": "TTFT p99 ms",
    "p50_tpot_ms": "TPOT p50 ms",
    "p99_tpot_ms": "TPOT p99 ms",
}
POLL = 2.0  # seconds between two looks at the server's memory


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

    def most_tokens(self) -> int:
        """Of a request and its answer. vLLM's client takes prompts of at most 1024 tokens from ShareGPT's JSON."""
        return self.output_len + (self.input_len if self.data is None else 1024)

    def dataset_arguments(self) -> list[str]:
        if self.data is not None:
            output = ["--sharegpt-output-len", str(self.output_len)]
            return ["--dataset-name", "sharegpt", "--dataset-path", str(self.data), *output]
        lengths = ["--random-input-len", str(self.input_len), "--random-output-len", str(self.output_len)]
        return ["--dataset-name", "random", *lengths]


def online(
    server: Server, tokenizer: str, workload: Workload, users: int, seed: int, log: Path, monitor: Monitor
) -> dict[str, float]:
    """Load a server with `users`, each of whom sends the next request when the last one is answered.

    Args:
        tokenizer: folder or hub id whose tokenizer makes the prompts.
        log: file for the output of `vllm bench serve`; its result lies beside it.

    Returns:
        The figures of REPORTED, and memory_bytes: the most that the server's process tree held, unless it ran already.

    Raises:
        RiaError: the server or a request failed.
    """
    requests = users * workload.requests_per_user
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    command = [*VLLM, "bench", "serve", "--backend", "openai", "--base-url", server.url]
    command += ["--endpoint", "/v1/completions"]
    command += ["--model", tokenizer, "--served-model-name", server.model_name, "--tokenizer", tokenizer]
    command += [*workload.dataset_arguments(), "--num-prompts", str(requests), "--seed", str(seed), "--ignore-eos"]
    command += ["--max-concurrency", str(users), "--num-warmups", str(users), "--temperature", "0"]
    command += ["--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,99"]
    command += ["--save-result", "--save-detailed", "--result-dir", str(result.parent)]
    command += ["--result-filename", result.name]
    command += server.engine.client_arguments
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    direct = ",".join(filter(None, (given, *HERE)))  # no proxy for a server on this machine
    environment = {"no_proxy": direct, "NO_PROXY": direct, "OPENAI_API_KEY": api_key()}
    shown = f"{requests} requests of {users} user{'s' * (users > 1)}"
    with SupervisedProcess(command, log, environment) as client, monitor.phase(shown):
        peak = server.memory()
        while (status := client.wait(POLL)) is None:
            peak = max(peak, server.memory())
        peak = max(peak, server.memory())
        if server.process is not None and not server.process.running:
            raise RiaError(f"The server ended under load. {server.end_of_log()}")
        if status != 0:
            raise RiaError(f"vllm bench serve ended with status {status}. {client.end_of_log()}")
    figures = read_result(result, requests, workload.output_len, recount=not server.engine.counts_tokens)
    return figures if server.process is None else {**figures, "memory_bytes": peak}


def read_result(result: Path, requests: int, output_len: int, recount: bool = False) -> dict[str, float]:
    """The figures of a result file of `vllm bench serve`.

    Args:
        output_len: tokens of each answer.
        recount: the client did not see how many tokens the server wrote, and split the text again: take `output_len`.

    Raises:
        RiaError: there is none, a request failed, an answer was too short, or a figure is not a finite number.
    """
    try:
        content = json.loads(result.read_text())
    except (OSError, ValueError) as error:
        raise RiaError(f"{result}: no readable result ({error}).") from None
    errors = [error for error in content.get("errors", []) if error]
    if errors or content.get("completed") != requests or content.get("failed"):
        raise RiaError(f"{result}: {content.get('completed')} of {requests} requests completed. {''.join(errors[:1])}")
    output_tokens = requests * output_len
    if recount:
        pieces = min(map(len, content["itls"])) + 1
        if pieces < output_len // 4:  # tokens of a single byte wait for the rest of a character, four at most
            raise RiaError(f"{result}: an answer of {pieces} pieces, where {output_len} tokens were asked for.")
        times = [1000 * sum(gaps) / (output_len - 1) for gaps in content["itls"]]
        content["p50_tpot_ms"], content["p99_tpot_ms"] = np.percentile(times, [50, 99]).tolist()
        content["output_throughput"] = output_tokens / content["duration"]
    elif content.get("total_output_tokens") != output_tokens:
        raise RiaError(f"{result}: {content.get('total_output_tokens')} output tokens instead of {output_tokens}.")
    for name in REPORTED:
        if not isinstance(content.get(name), int | float) or not 0 <= content[name] < float("inf"):
            raise RiaError(f"{result}: no usable {name}.")
    return {name: content[name] for name in REPORTED}
