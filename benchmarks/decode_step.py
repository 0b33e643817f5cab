"""What a step of decoding takes beyond the bytes that it reads: `python -m benchmarks.decode_step MODEL`.

One user, no server: vLLM's engine runs in this process. MODEL is a folder, dense or of `ria-vllm compress`. Set
`VLLM_CPU_NUM_OF_RESERVED_CPU=0` to give it every core, and run nothing else meanwhile.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import torch

STEPS, ROUNDS = 64, 20


def read_rate(size: int = 1 << 29) -> float:
    """Bytes a second that a sum over float32 numbers reads with torch's threads; no cache holds them."""
    numbers = torch.ones(size // 4)
    return size / median(lambda: numbers.sum())


def median(call: Callable[[], Any]) -> float:
    """Seconds."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def sizes(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes that a step reads, and those of the pruned linears among them. Of an embedding that is no head, it reads a
    row only."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    heads = [one for one in model.modules() if isinstance(one, ParallelLMHead)]
    sources = [getattr(one.quant_method, "source", one) for one in heads]  # the tied embedding, where it is in int8
    read = {tensor.data_ptr() for one in sources for tensor in one.parameters(recurse=False)}
    everything: dict[int, int] = {}
    pruned = 0
    for module in model.modules():
        mine = {tensor.data_ptr(): tensor.nbytes for tensor in module.parameters(recurse=False)}
        if isinstance(module, VocabParallelEmbedding):
            mine = {place: size for place, size in mine.items() if place in read}
        everything |= mine
        pruned += sum(mine.values()) if getattr(module, "ria_packed", None) is not None else 0
    return sum(everything.values()), pruned


def linears_once(model: torch.nn.Module) -> float:
    """Seconds for all pruned linears, one after the other, one token each; 0 if there are none."""
    layers = [one for one in model.modules() if getattr(one, "ria_packed", None) is not None]
    inputs = [torch.randn(1, one.input_size_per_partition, dtype=one.quant_method.dtype) for one in layers]

    def all_of_them() -> None:
        for layer, x in zip(layers, inputs, strict=True):
            layer.quant_method.apply(layer, x)

    return median(all_of_them) if layers else 0.0


def step(engine: Any, prompt: list[int]) -> float:
    """Seconds, the median."""
    from vllm import SamplingParams

    engine.add_request("one", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=STEPS, ignore_eos=True))
    times = []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@click.command(help=__doc__)
@click.argument("model")
@click.option("--eager", is_flag=True, help="Do not compile.")
@click.option("--prompt", default=128, show_default=True, help="Tokens.")
def main(model: str, eager: bool, prompt: int) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    llm = LLM(model, enforce_eager=eager, max_model_len=1024, enable_prefix_caching=False, skip_tokenizer_init=True)
    step(llm.llm_engine, list(range(prompt)))  # warm
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "ms": 1e3 * step(llm.llm_engine, list(range(prompt)))}
    rate = read_rate()
    ((everything, pruned),) = llm.apply_model(sizes)
    (linears,) = llm.apply_model(linears_once)
    found |= {"GB/s of a plain read": rate / 1e9, "MB": everything / 1e6, "ms for these": 1e3 * everything / rate}
    found["ms beyond"] = found["ms"] - found["ms for these"]
    if linears:
        found |= {"MB of pruned linears": pruned / 1e6, "ms of these": 1e3 * linears}
        found["of the plain read's rate"] = pruned / linears / rate
    click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
