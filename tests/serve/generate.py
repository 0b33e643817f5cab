"""Run vLLM on several folders in one process: `python generate.py JOBS.json RESULTS.json [--stop]`.

`--stop` stops at the first error. Otherwise the next folder follows.

A job: {"model", "prompts": lists of token ids, "tokens": how many to generate, "engine": arguments of `LLM`,
"first": true to generate once before the generation that counts, "lora": folder of an adapter,
"prompt_logprobs": false to leave them out, "call": "embed" or "classify" instead, "score" each of "documents" for
"query" (joined by "template", or null), or "load" (see `zoo.built`), "images": for each prompt the path of an image or
null, "texts" with "image", the file that each of them shows, after the prompts}.

A result: for each prompt the prompt as the model read it, its logprobs (from the second token on), the generated
tokens, their logprobs and how many prompt tokens came from the cache; or "error".
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

KV_CACHE = 64 * 2**20  # bytes. vLLM fills all of it with zeros.
ENGINE = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 8, "kv_cache_memory_bytes": KV_CACHE}


def image(path: str) -> Any:
    from PIL import Image

    return Image.open(path).convert("RGB")


def run(job: dict[str, Any]) -> Any:
    if job.get("call") == "load":
        from zoo.built import load

        return load(job["model"], job["engine"])
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(job["model"], **(ENGINE | {"skip_tokenizer_init": True} | job.get("engine", {})))
    prompts: list[dict[str, Any]] = [{"prompt_token_ids": p} for p in job.get("prompts", [])]
    for prompt, path in zip(prompts, job.get("images", [])):
        if path:
            prompt["multi_modal_data"] = {"image": image(path)}
    for text in job.get("texts", []):
        prompts.append({"prompt": text, "multi_modal_data": {"image": image(job["image"])}})
    if job.get("call") == "embed":
        return [output.outputs.embedding for output in llm.embed(prompts, use_tqdm=False)]
    if job.get("call") == "score":
        scored = llm.score(job["query"], job["documents"], chat_template=job["template"], use_tqdm=False)
        return [output.outputs.score for output in scored]
    if job.get("call") == "classify":
        return [output.outputs.probs for output in llm.classify(prompts, use_tqdm=False)]
    sampling = SamplingParams(
        max_tokens=job.get("tokens", 8), temperature=0, logprobs=1, detokenize=False, ignore_eos=True,
        prompt_logprobs=1 if job.get("prompt_logprobs", True) else None,
    )  # fmt: skip
    adapter = LoRARequest("adapter", 1, job["lora"]) if "lora" in job else None
    if job.get("first"):
        llm.generate(prompts, sampling, use_tqdm=False)
    results = []
    for output in llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapter):
        entries = zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:])
        made = output.outputs[0]
        results.append({
            "prompt": [entry[token].logprob for token, entry in entries],
            "tokens": list(made.token_ids),
            "logprobs": [entry[token].logprob for token, entry in zip(made.token_ids, made.logprobs)],
            "cached": output.num_cached_tokens,
            "prompt_ids": list(output.prompt_token_ids),
        })  # fmt: skip
    return results


def name_by_port() -> None:
    """Let ranks that are launched from outside meet by their port. vLLM 0.32 names their shared memory after the place
    where they meet, and so alike in all runs at once if that comes from the environment."""
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    address, rank = f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}", int(os.environ["RANK"])
    ExecutorWithExternalLauncher._distributed_args = lambda executor: (address, rank, rank)


def prepare() -> None:
    """What takes long and is the same for all jobs."""
    from vllm.platforms import current_platform

    # Functions of the sampler would be compiled in each process.
    current_platform.simple_compile_backend = "eager"

    import vllm.entrypoints.llm
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.models import registry

    # The first that is asked for imports them all.
    get_quantization_config("compressed-tensors")
    # vLLM looks at each class of models in a process of its own, which imports vLLM, and keeps what it finds in the
    # user's cache.
    registry._run_in_subprocess = lambda look: look()


def main(jobs_path: str, results_path: str, *options: str) -> None:
    prepare()
    from vllm.distributed import cleanup_dist_env_and_memory

    if "RANK" in os.environ:
        name_by_port()
    # vLLM looks for garbage ten times for each model, and among all modules too, because it unfreezes what is frozen.
    # That takes several times as long as the rest. So it gets no say in what is frozen: what is there before a model.
    freeze = gc.freeze
    gc.freeze = gc.unfreeze = lambda: None
    results: list[Any] = []
    for job in json.loads(Path(jobs_path).read_text()):
        freeze()
        try:
            results.append(run(job))
        except Exception as error:  # the test decides whether it was expected
            traceback.print_exc()
            results.append({"error": f"{type(error).__name__}: {error}"})
        gc.collect()
        cleanup_dist_env_and_memory()
        Path(results_path).write_text(json.dumps(results))
        if "--stop" in options and "error" in results[-1]:
            break


if __name__ == "__main__":
    main(*sys.argv[1:])
