"""vLLM's features on a pruned model: each gives the pruned model's logprobs, or is refused with a message."""

from types import SimpleNamespace

import pytest
import tiny
import torch
import vllm
from compare import check, generate
from lora import merged, write_adapter

pytestmark = pytest.mark.slow


def prompts() -> list[list[int]]:
    """The longest fills two blocks of the cache."""
    rng = torch.Generator().manual_seed(2)
    return [torch.randint(3, tiny.VOCAB, (n,), generator=rng).tolist() for n in (5, 17, 70)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    model = tiny.write(tiny.FAMILIES["llama-gqa"], folder / "out")
    tiny.write(tiny.FAMILIES["llama-gqa"], folder / "draft", layers=1)
    tiny.add_tokenizer(folder / "out")
    with_adapter = merged(model, write_adapter(model, folder / "adapter"))
    quantized = tiny.write(tiny.FAMILIES["llama-gqa"], folder / "int4", weights="int4-g64", head=True)
    quantized_adapter = write_adapter(quantized, folder / "adapter of int4")
    draft = {"method": "draft_model", "model": str(folder / "draft"), "num_speculative_tokens": 2}
    lora = {"enable_lora": True, "max_lora_rank": 8}
    jobs = {
        "prefix caching": {"engine": {"block_size": 32}, "first": True, "prompt_logprobs": False},
        "chunked prefill": {"engine": {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}},
        "speculative decoding with a pruned draft": {
            "model": str(folder / "int4"),
            "engine": {"speculative_config": draft},
            "prompt_logprobs": False,
        },
        # vLLM's LoRA on CPUs cannot give logprobs of prompts, for any base model
        "lora, adapter": {"engine": lora, "lora": str(folder / "adapter"), "prompt_logprobs": False},
        "lora, adapter on int4-g64": {
            "model": str(folder / "int4"),
            "engine": lora,
            "lora": str(folder / "adapter of int4"),
            "prompt_logprobs": False,
        },
    }
    common = {"model": str(folder / "out"), "prompts": prompts(), "tokens": 6}
    todo = [common | job | {"engine": {"dtype": "float32"} | job.get("engine", {})} for job in jobs.values()]
    results = generate(folder / "run", todo)
    results = dict(zip(jobs, results, strict=True))
    return SimpleNamespace(
        model=model,
        quantized=quantized,
        merged=with_adapter,
        merged_quantized=merged(quantized, quantized_adapter),
        results=results,
    )


@pytest.mark.parametrize(
    "name",
    ["chunked prefill", "speculative decoding with a pruned draft", "prefix caching"],
)
def test_same_logprobs(runs, name):
    if name.startswith("speculative") and vllm.__version__.startswith("0.30."):
        pytest.skip("vLLM 0.30 cannot run a draft model on CPUs, dense ones included")
    model = runs.quantized if name.startswith("speculative") else runs.model
    check(model, runs.results[name], given=prompts())


def test_prefix_cache_was_used(runs):
    assert runs.results["prefix caching"][2]["cached"] == 64


def test_adapter_counts_channels_in_the_models_own_order(runs):
    check(runs.merged, runs.results["lora, adapter"], given=prompts())


def test_an_adapter_is_not_rounded_with_integer_weights(runs):
    check(runs.merged_quantized, runs.results["lora, adapter on int4-g64"], given=prompts())
