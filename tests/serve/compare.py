"""vLLM's logprobs against those of Hugging Face on the same weights.

In float32, both sides compute the same sums in another order: 1e-4 on a logprob is 20 times what is observed. In
bfloat16, each activation is rounded to 8 bits. Through two layers that changes logprobs, which lie between -10 and 0,
by up to about 0.06, and by less than 0.02 on average. The bounds leave a factor of 2.5. A wrong permutation or sign
changes logprobs by whole units.
"""

import json
import socket
from pathlib import Path
from typing import Any

import forked
import tiny
import torch

# vLLM's library for AVX2 is off by up to 2e-4, on the dense models too.
FLOAT32_LIMIT = 1e-4 if torch.cpu._is_avx512_supported() else 5e-4
GENERATE = Path(__file__).with_name("generate.py")


def prompts() -> list[list[int]]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(3, tiny.VOCAB, (n,), generator=rng).tolist() for n in (5, 17, 33)]


def job_of(model: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """A job for `generate`: six tokens after each of `prompts`, in float32 unless `changes` say otherwise."""
    engine = {"dtype": "float32"} | changes.get("engine", {})
    return {"model": str(model), "prompts": prompts(), "tokens": 6} | changes | {"engine": engine}


def generate(folder: Path, jobs: list[dict], **environment: str) -> list:
    """The results of generate.py for the jobs.

    Jobs whose ranks are launched from outside run one after another in a process for each rank, which takes a fifth of
    the time that vLLM takes to start processes for each of them. All other jobs run in one process, with the engine.
    """
    ranks = [_ranks(job.get("engine", {})) for job in jobs]
    results = {}
    for size in set(ranks):
        chosen = [job for job, other in zip(jobs, ranks, strict=True) if other == size]
        places = _places(folder, size) if size else {folder: {}}
        first, *others = _run(chosen, {place: environment | more for place, more in places.items()})
        assert all(other == first for other in others)
        results[size] = iter(first)
    return [next(results[size]) for size in ranks]


def _ranks(engine: dict) -> int:
    """How many ranks of an engine are to be launched from outside."""
    if engine.get("distributed_executor_backend") != "external_launcher":
        return 0
    return engine.get("tensor_parallel_size", 1) * engine.get("pipeline_parallel_size", 1)


def _places(folder: Path, size: int) -> dict[Path, dict[str, str]]:
    """The folder of each rank -> its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared = address | {"WORLD_SIZE": str(size)}
    return {folder / f"rank{i}of{size}": shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(size)}


def _run(jobs: list[dict], places: dict[Path, dict[str, str]]) -> list[list]:
    """The results of the same jobs in a process for each folder, with its environment, all at the same time."""
    runs = []
    for folder, environment in places.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "jobs.json").write_text(json.dumps(jobs))
        arguments = [str(folder / name) for name in ("jobs.json", "results.json")]
        runs.append({"arguments": arguments, "environment": environment, "log": str(folder / "log")})
    statuses = forked.run(runs, timeout=900)
    assert not any(statuses), (statuses, *((folder / "log").read_text()[-5000:] for folder in places))
    return [json.loads((folder / "results.json").read_text()) for folder in places]


def predicted(model, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's logprobs [tokens - 1, vocabulary] after each token but the last, and those of the next tokens."""
    sequence = torch.tensor([tokens])
    with torch.no_grad():
        logprobs = model(sequence).logits.float().log_softmax(-1)[0, :-1]
    return logprobs, logprobs.gather(-1, sequence[0, 1:, None])[:, 0]


def differences(model, results, given: list[list[int]] | None = None) -> torch.Tensor:
    """|logprob of vLLM - logprob of Hugging Face| of each token of all prompts and of vLLM's continuations."""
    assert "error" not in results, results
    found = []
    for prompt, result in zip(given or prompts(), results, strict=True):
        logprobs, want = predicted(model, prompt + result["tokens"])
        got = torch.tensor(result["prompt"] + result["logprobs"])
        found.append((want[-len(got) :] - got).abs())
        greedy = logprobs[len(prompt) - 1 :].max(-1).values
        assert (greedy - want[len(prompt) - 1 :]).max() < 0.2  # greedy, except for ties that rounding decides
    return torch.cat(found)


def check(model, results, half: bool = False, given: list[list[int]] | None = None) -> None:
    off = differences(model, results, given)
    if half:
        assert off.max() < 0.15 and off.mean() < 0.05
    else:
        assert off.max() < FLOAT32_LIMIT
