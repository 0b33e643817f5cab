"""vLLM on small checkpoints of every family against Hugging Face on the same pruned weights, token by token."""

import pytest
import tiny
import torch
from compare import check
from families import LATENT_ATTENTION, ROTARY
from runs import ALL_GATHER, ONE_THREAD_EACH, TWO_PROCESSES, TWO_RANKS, TWO_STAGES, Runs

pytestmark = pytest.mark.slow


# Name of the run: (family, how the checkpoint is written, engine arguments)
EAGER = {name: (name, {}, LATENT_ATTENTION if name == "deepseek-v3" else {}) for name in tiny.FAMILIES} | {
    "latent attention that gathers": ("deepseek-v3", {"dense": ("kv_b_proj",)}, LATENT_ATTENTION),
    "a permutation for each of q, k, v, gate, up": ("llama-gqa", {"scope": "linear"}, {}),
    "no permutations": ("llama-gqa", {"scope": "none"}, {}),
    "no folds": ("qwen2", {"folds": False}, {}),
    "some linears dense": (
        "llama-gqa",
        {
            "dense": tuple(f"0.self_attn.{n}_proj" for n in "qkv")
            + ("1.mlp.down_proj", "0.mlp.gate_proj", "0.mlp.up_proj")
        },
        {},
    ),
    "bfloat16": ("llama-gqa", {"dtype": torch.bfloat16}, {"dtype": "bfloat16"}),
    "float16": ("qwen3", {"dtype": torch.float16}, {"dtype": "float16"}),
    "bfloat16, latent attention": ("deepseek-v3", {"dtype": torch.bfloat16}, {"dtype": "bfloat16"} | ROTARY),
    "bfloat16 served as float32": ("llama-gqa", {"dtype": torch.bfloat16}, {}),
}
COMPILED = {
    "compiled": ("llama-gqa", {"scope": "linear"}, {"enforce_eager": False}),
    "compiled, latent attention": ("deepseek-v3", {}, {"enforce_eager": False} | LATENT_ATTENTION),
    "compiled with biases": ("opt", {}, {"enforce_eager": False}),
}
SPREAD = {
    "two ranks": ("llama-gqa", {}, TWO_PROCESSES),
    "two ranks, fewer key-value heads, no folds": ("llama-mqa", {"folds": False}, TWO_RANKS),
    "four ranks, fewer key-value heads": ("llama-gqa", {}, TWO_RANKS | {"tensor_parallel_size": 4}),
    "two stages": ("llama-gqa", {}, TWO_STAGES),
    "two ranks, values in blocks": ("gpt-neox", {}, TWO_RANKS),
    "two ranks, latent attention": ("deepseek-v3", {}, TWO_RANKS | LATENT_ATTENTION),
    "two ranks, no folds, permutations that keep to blocks": (
        "llama-gqa",
        {"folds": False, "blocks": 8},
        TWO_RANKS,
    ),
    "two ranks with padding": ("qwen2", {"intermediate_size": 192}, TWO_RANKS),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("vllm"))


@pytest.mark.parametrize("name", EAGER)
def test_eager(runs, name):
    model, results = runs.get(EAGER, name)
    check(model, results, half="dtype" in EAGER[name][2])


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(runs, name):
    check(*runs.get(COMPILED, name))


@pytest.mark.parametrize("name", SPREAD)
def test_several_processes(runs, name):
    check(*runs.get(SPREAD, name, **ONE_THREAD_EACH))


def test_permutations_that_cross_ranks_are_warned_of(runs):
    runs.get(SPREAD, "two ranks, fewer key-value heads, no folds", **ONE_THREAD_EACH)
    assert ALL_GATHER in (runs.place(SPREAD) / "rank0of2" / "log").read_text()


def test_tensor_parallel_gives_the_tokens_of_one_rank(runs):
    _, one = runs.get(EAGER, "llama-gqa")
    _, two = runs.get(SPREAD, "two ranks", **ONE_THREAD_EACH)
    assert [r["tokens"] for r in one] == [r["tokens"] for r in two]
