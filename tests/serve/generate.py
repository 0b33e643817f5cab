"""Run vLLM on several folders in one process: `python generate.py JOBS.json RESULTS.json`.

A job: {"model", "prompts": lists of token ids, "tokens": how many to generate, "engine": arguments of `LLM`}. A result:
for each prompt the prompt's logprobs (from the second token on), the generated tokens and their logprobs; or "error".
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams

    settings = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 8}
    llm = LLM(job["model"], **(settings | job.get("engine", {})))
    sampling = SamplingParams(
        max_tokens=job.get("tokens", 8), temperature=0, logprobs=1, prompt_logprobs=1, detokenize=False, ignore_eos=True
    )
    results = []
    for output in llm.generate([{"prompt_token_ids": p} for p in job["prompts"]], sampling, use_tqdm=False):
        prompt = [entry[token].logprob for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:])]
        made = output.outputs[0]
        logprobs = [entry[token].logprob for token, entry in zip(made.token_ids, made.logprobs)]
        results.append({"prompt": prompt, "tokens": list(made.token_ids), "logprobs": logprobs})
    return results


def main(jobs_path: str, results_path: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    results: list[Any] = []
    for job in json.loads(Path(jobs_path).read_text()):
        try:
            results.append(run(job))
        except Exception as error:  # the test decides whether it was due
            results.append({"error": f"{type(error).__name__}: {error}"})
        gc.collect()
        cleanup_dist_env_and_memory()
        Path(results_path).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
