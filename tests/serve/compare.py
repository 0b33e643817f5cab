"""vLLM's logprobs against those of Hugging Face on the same weights.

In float32, both sides compute the same sums in another order: 1e-4 on a logprob is 20 times what is observed. In
bfloat16, each activation is rounded to 8 bits. Through two layers that changes logprobs, which lie between -10 and 0,
by up to about 0.06, and by less than 0.02 on average. The bounds leave a factor of 2.5. A wrong order or sign changes
logprobs by whole units.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import tiny
import torch

GENERATE = Path(__file__).with_name("generate.py")


def prompts() -> list[list[int]]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(3, tiny.VOCAB, (n,), generator=rng).tolist() for n in (5, 17, 33)]


def generate(folder: Path, jobs: list[dict], **environment: str) -> list:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    log = folder / "log"
    with open(log, "w") as file:
        process = subprocess.run(
            [sys.executable, str(GENERATE), str(folder / "jobs.json"), str(folder / "results.json")],
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"} | environment,
            stdout=file, stderr=subprocess.STDOUT, timeout=900,
        )  # fmt: skip
    assert process.returncode == 0, log.read_text()[-5000:]
    return json.loads((folder / "results.json").read_text())


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


def recomputed(model, results, given: list[list[int]]) -> list[dict]:
    """The results with the logprobs that this model gives the same tokens, in its own dtype."""
    found = []
    for prompt, result in zip(given, results, strict=True):
        _, mine = predicted(model, prompt + result["tokens"])
        before, after = mine.split([len(prompt) - 1, len(result["tokens"])])
        found.append(result | {"prompt": before[-len(result["prompt"]) :].tolist(), "logprobs": after.tolist()})
    return found


def check(model, results, half: bool = False, given: list[list[int]] | None = None) -> None:
    off = differences(model, results, given)
    if half:
        assert off.max() < 0.15 and off.mean() < 0.05
    else:
        assert off.max() < 1e-4
