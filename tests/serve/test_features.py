"""vLLM's features on a pruned model: each gives the pruned model's logprobs, or is refused with a message."""

from types import SimpleNamespace

import pytest
import tiny
import torch
import vllm
from compare import check, generate
from families import LATENT_ATTENTION
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
    quantized = tiny.write(tiny.FAMILIES["llama-gqa"], folder / "int4", weights="int4-g64")
    merged_quantized = merged(quantized, write_adapter(quantized, folder / "adapter of int4"))
    latent = tiny.write(tiny.FAMILIES["deepseek-v3"], folder / "latent")
    draft = {"method": "draft_model", "model": str(folder / "draft"), "num_speculative_tokens": 2}
    lora = {"enable_lora": True, "max_lora_rank": 8}
    jobs = {
        "prefix caching": {"engine": {"block_size": 32}, "first": "generate", "prompt_logprobs": False},
        "chunked prefill": {"engine": {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}},
        "weight reload": {"first": "reload"},
        "speculative decoding with a pruned draft": {"engine": {"speculative_config": draft}, "prompt_logprobs": False},
        # vLLM's LoRA on CPUs cannot give logprobs of prompts, for any base model
        "lora, base": {"engine": lora, "prompt_logprobs": False},
        "lora, adapter": {"engine": lora, "lora": str(folder / "adapter"), "prompt_logprobs": False},
        "weight reload, latent attention": {
            "model": str(folder / "latent"),
            "engine": LATENT_ATTENTION,
            "first": "reload",
        },
        "weight reload, int4-g64": {"model": str(folder / "int4"), "first": "reload"},
        "lora, adapter on int4-g64": {
            "model": str(folder / "int4"),
            "engine": lora,
            "lora": str(folder / "adapter of int4"),
            "prompt_logprobs": False,
        },
        "load format dummy, int4-g64": {"model": str(folder / "int4"), "engine": {"load_format": "dummy"}},
        "load format dummy": {"engine": {"load_format": "dummy"}},
        "embeddings": {
            "engine": {"runner": "pooling", "convert": "embed", "skip_tokenizer_init": False},
            "call": "embed",
        },
        "sleep mode": {"engine": {"enable_sleep_mode": True}},  # last, because vLLM's refusal breaks its process
    }
    common = {"model": str(folder / "out"), "prompts": prompts(), "tokens": 6}
    todo = [common | job | {"engine": {"dtype": "float32"} | job.get("engine", {})} for job in jobs.values()]
    results = generate(folder / "run", todo)
    results = dict(zip(jobs, results, strict=True))
    int4 = {name: results.pop(name) for name in list(results) if "int4" in name}
    return SimpleNamespace(
        model=model, merged=with_adapter, results=results, quantized=quantized, merged_quantized=merged_quantized,
        int4=int4, latent=latent,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["chunked prefill", "weight reload", "speculative decoding with a pruned draft", "lora, base", "prefix caching"],
)
def test_same_logprobs(runs, name):
    if name.startswith("speculative") and vllm.__version__.startswith("0.30."):
        pytest.skip("vLLM 0.30 cannot run a draft model on CPUs, dense ones included")
    check(runs.model, runs.results[name], given=prompts())


def test_latent_attention_takes_its_own_weights_anew(runs):
    check(runs.latent, runs.results["weight reload, latent attention"], given=prompts())


def test_prefix_cache_was_used(runs):
    assert runs.results["prefix caching"][2]["cached"] == 64


def test_adapter_counts_channels_in_the_models_own_order(runs):
    check(runs.merged, runs.results["lora, adapter"], given=prompts())


def test_integer_weights(runs):
    """A reload, and an adapter, which is not rounded with the weights."""
    check(runs.quantized, runs.int4["weight reload, int4-g64"], given=prompts())
    check(runs.merged_quantized, runs.int4["lora, adapter on int4-g64"], given=prompts())


def test_dummy_weights_load(runs):
    for results in (runs.results["load format dummy"], runs.int4["load format dummy, int4-g64"]):
        assert [len(result["tokens"]) for result in results] == [6, 6, 6]


def test_embeddings(runs):
    for prompt, embedding in zip(prompts(), runs.results["embeddings"], strict=True):
        with torch.no_grad():
            last = runs.model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        torch.testing.assert_close(torch.tensor(embedding), last / last.norm(), rtol=0, atol=1e-5)


def test_sleep_mode_is_refused_on_cpus_by_vllm_itself(runs):
    assert "Sleep mode is not supported" in runs.results["sleep mode"]["error"]
