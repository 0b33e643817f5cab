"""llama.cpp's server as a side: a .gguf file, served by `llama-server` if that is on the path, else by xllamacpp.

Its completions give the logprobs of tokens that it writes, not of the prompt's. So each position of a text is one
request, whose prompt is what precedes; llama.cpp keeps keys and values of the request before.
"""

import argparse
import importlib.util
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ria_vllm.errors import RiaError

VOCABULARY = 1 << 20  # at most
Ask = Callable[..., Any]  # (path, content of a POST request) -> the answer


@cache
def vllm_threads() -> int | None:
    """With which vLLM's engine computes here, in all ranks that VLLM_CPU_OMP_THREADS_BIND names; None on a GPU."""
    import torch
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    if not current_platform.is_cpu():
        return None
    logging.getLogger(OMPProcessManager.__module__).disabled = True  # servers say it in their logs
    ranks = envs.VLLM_CPU_OMP_THREADS_BIND.count("|") + 1
    parallel = SimpleNamespace(local_world_size=ranks, data_parallel_rank_local=None, _api_process_count=1)
    cores = OMPProcessManager(SimpleNamespace(parallel_config=parallel, kv_transfer_config=None)).cpu_lists
    return sum(map(len, cores)) or torch.get_num_threads()  # nobind


class LlamaCpp:
    """Serves files. It is asked as `Vllm` is."""

    # Its server closes a connection that is idle for seconds, at times just as the client uses it again. One that runs
    # already may keep prompts.
    client_arguments = ("--header", "Connection=close", "--extra-body", '{"cache_prompt": false}')
    counts_tokens = False  # the client splits the text again

    def command(self, model: str, port: int, arguments: Sequence[str]) -> list[str]:
        """With as many threads as vLLM has, and no cache of prompts.

        Raises:
            RiaError: the file or llama.cpp is missing.
        """
        if not Path(model).is_file():
            raise RiaError(f"{model}: no such file. llama.cpp serves files: download it first.")
        server = shutil.which("llama-server")
        if server is None and importlib.util.find_spec("xllamacpp") is None:
            raise RiaError(
                f"{model} is served by llama.cpp. Put a `llama-server` built for this processor on the path, or "
                "`pip install xllamacpp`, whose build uses AVX2 at most."
            )
        start = [sys.executable, "-m", __spec__.name] if server is None else [server]
        start += ["--model", model, "--host", "127.0.0.1", "--port", str(port)]
        return [*start, "--threads", str(self.threads()), "--no-cache-prompt", *arguments]

    def arguments(self, of_vllm: Sequence[str], users: int, tokens: int) -> Sequence[str]:
        """For so many users at once, each with a prompt and an answer of so many tokens in all."""
        return ["--parallel", str(users), "--ctx-size", str(users * tokens)]

    def threads(self) -> int:
        """As many as vLLM has, or all that this process may have if that computes on a GPU."""
        return vllm_threads() or len(os.sched_getaffinity(0))

    def weight_files(self, model: str) -> set[Path]:
        """All parts of a model in parts, which llama.cpp finds itself."""
        return set(Path(model).parent.glob(re.sub(r"-\d{5}-of-", "-*-of-", Path(model).name)))

    def tokenize(self, ask: Ask, model: str, text: str) -> tuple[list[int], int]:
        """The text's tokens, and the tokens that fit a request."""
        tokens = ask("/tokenize", {"content": text, "add_special": True})["tokens"]
        return tokens, ask("/props")["default_generation_settings"]["n_ctx"]

    def prompt_logprobs(self, ask: Ask, model: str, window: list[int], top: int) -> list[dict[int, float]]:
        """Logprobs of the `top` likeliest tokens and of the window's own one, for all of its positions but the first.

        Raises:
            LookupError, TypeError: an answer is not as expected.
        """
        # What is written does not matter, but llama.cpp tells nothing of ends and parts of characters: let it write a.
        written = {"n_predict": 1, "logit_bias": [[ask("/tokenize", {"content": "a"})["tokens"][-1], 1000.0]]}
        positions = []
        for end in range(1, len(window)):
            request = {"prompt": window[:end], "cache_prompt": True} | written
            listed = _listed(ask("/completion", request | {"n_probs": top}))
            if window[end] not in listed:
                listed[window[end]] = _listed(ask("/completion", request | {"n_probs": VOCABULARY}))[window[end]]
            positions.append(listed)
        return positions


def _listed(answer: dict[str, Any]) -> dict[int, float]:
    return {one["id"]: one["logprob"] for one in answer["completion_probabilities"][0]["top_logprobs"]}


def main() -> None:
    """`llama-server` with the arguments of `LlamaCpp.command`, by xllamacpp."""
    import xllamacpp

    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--model", "--host"):
        parser.add_argument(name, required=True)
    for name in ("--port", "--threads", "--parallel", "--ctx-size"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--no-cache-prompt", action="store_true", required=True)
    given = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path, params.hostnames, params.port = given.model, [given.host], given.port
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given.threads
    params.n_parallel, params.n_ctx, params.cache_prompt = given.parallel, given.ctx_size, False
    server = xllamacpp.Server(params)
    while server:
        time.sleep(3600)


if __name__ == "__main__":
    main()
