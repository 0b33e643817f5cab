"""vLLM on small checkpoints against Hugging Face on the same pruned weights, token by token.

The zoo has other families, and test_server.py has the compiled model. Where inputs are rounded to int8, Hugging Face's
model rounds those of its pruned linears.
"""

import re

import pytest
import tiny
import torch
from compare import check, differences
from families import LATENT_ATTENTION, ROTARY
from runs import ALL_GATHER, ONE_THREAD_EACH, TWO_PROCESSES, TWO_RANKS, TWO_STAGES, Runs

from ria_vllm.checkpoint.reader import Reader

pytestmark = pytest.mark.slow

# vLLM names its layers by a prefix that is not their path.
GPTJ = tiny.Family(
    "gptj",
    settings=(
        ("n_embd", tiny.HIDDEN), ("n_layer", 2), ("n_head", tiny.HEADS), ("n_inner", tiny.INNER), ("rotary_dim", 16),
    ),
)  # fmt: skip
BF16, FP16 = {"dtype": torch.bfloat16}, {"dtype": torch.float16}
SERVED_BF16, SERVED_FP16 = {"dtype": "bfloat16"}, {"dtype": "float16"}
SOME_DENSE = tuple(f"0.self_attn.{n}_proj" for n in "qkv") + ("1.mlp.down_proj", "0.mlp.gate_proj", "0.mlp.up_proj")
DENSE_INT8 = {"weights": "int8", "dense": SOME_DENSE, "int8": True}

# Name of the run: (family, how the checkpoint is written, engine arguments)
ALONE = {
    "grouped queries": ("llama-gqa", {}, {}),
    "tied head": ("gemma2", {}, {}),
    "biases": ("opt", {}, {}),
    "values in blocks": ("gpt-neox", {}, {}),
    "other prefixes": (GPTJ, {"folds": False}, {}),
    "rearranged rows": (tiny.FALCON, {}, {}),
    "latent attention": ("deepseek-v3", {}, LATENT_ATTENTION),
    "latent attention in bfloat16": ("deepseek-v3", BF16, SERVED_BF16 | ROTARY),
    "no permutations": ("llama-gqa", {"permuted": False}, {}),
    "some linears dense": ("llama-gqa", {"dense": SOME_DENSE}, {}),
    "float16": ("qwen3", FP16, SERVED_FP16),
    "int8": ("llama-gqa", {"weights": "int8"} | BF16, SERVED_BF16),
    "int8, dense ones too": ("llama-bias", DENSE_INT8 | BF16, SERVED_BF16),
    "fp8": ("llama-gqa", {"weights": "fp8"} | BF16, SERVED_BF16),
    "int4-g64": ("llama-gqa", {"weights": "int4-g64"} | BF16, SERVED_BF16),
    "int4-g64 in float16": ("llama-gqa", {"weights": "int4-g64"} | FP16, SERVED_FP16),
    "int4-g64 of 8:16, fused on disk": ("phi3", {"weights": "int4-g64", "pattern": "8:16"}, {}),
    "int8-g64, no folds": ("qwen2", {"weights": "int8-g64", "folds": False}, {}),
}
HEAD = {"rounded": True, "head": True}
ROUNDED = {
    "int8": ("llama-gqa", HEAD | {"weights": "int8", "vocab_size": 293}, {}),
    "int4-g64 compiled, tied head": (
        "qwen2", HEAD | {"weights": "int4-g64", "tie_word_embeddings": True}, {"enforce_eager": False},
    ),
    "int8, dense ones too": ("qwen2", DENSE_INT8 | {"rounded": True}, {}),
    "int8, all dense": ("llama-gqa", DENSE_INT8 | {"dense": ("_proj",), "permuted": False, "rounded": True}, {}),
    "int8, dense ones too, rearranged rows": (
        tiny.FALCON, DENSE_INT8 | {"dense": ("query_key_value",), "rounded": True}, {},
    ),
    "int8, 8:16": ("llama-gqa", {"rounded": True, "weights": "int8", "pattern": "8:16"}, {}),
}  # fmt: skip
DECOMPRESSED = {"8:16": ALONE["int4-g64 of 8:16, fused on disk"]}
SPREAD = {
    "two ranks": ("llama-gqa", {}, TWO_PROCESSES),
    "two ranks, fewer key-value heads, no folds": ("llama-mqa", {"folds": False}, TWO_RANKS),
    "two ranks, dense in int8": ("llama-gqa", DENSE_INT8 | BF16, TWO_RANKS | SERVED_BF16),
    "two ranks, latent attention": ("deepseek-v3", {}, TWO_RANKS | LATENT_ATTENTION),
    "two ranks, int4-g32 with padding": ("qwen2", {"weights": "int4-g32", "intermediate_size": 192}, TWO_RANKS),
    "two stages": ("llama-gqa", {}, TWO_STAGES),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("vllm"))


@pytest.mark.parametrize("name", ALONE)
def test_one_process(runs, name):
    check(*runs.get(ALONE, name), half="dtype" in ALONE[name][1])


def test_float16_is_more_exact_than_bfloat16(runs):
    """Its activations have three more bits, and integers stay what they are: nothing is rounded to bfloat16."""
    coarse, fine = (differences(*runs.get(ALONE, f"int4-g64{end}")).mean() for end in ("", " in float16"))
    assert fine < coarse / 4


def test_decompressed_as_on_a_gpu_that_cannot_multiply_the_pattern(runs):
    check(*runs.get(DECOMPRESSED, "8:16", RIA_VLLM_DENSE="1"))
    assert "RIA_VLLM_DENSE=1: pruned linears are decompressed" in (runs.place(DECOMPRESSED) / "log").read_text()


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_inputs(runs, name):
    """A difference in the last place may round a channel to the next integer, which moves it by a 127th of the largest.

    That happens to few tokens, whose logprobs move by up to 0.06. If only one side rounded, all would, by 0.04 on
    average. A head in int8 rounds its input to 15 bits.
    """
    off = differences(*runs.get(ROUNDED, name, RIA_VLLM_BACKEND="reference"))
    assert off.median() < 1e-4 and off.mean() < 5e-3


@pytest.mark.parametrize("name", SPREAD)
def test_several_processes(runs, name):
    check(*runs.get(SPREAD, name, **ONE_THREAD_EACH), half="dtype" in SPREAD[name][1])


def test_permutations_that_cross_ranks_are_warned_of(runs):
    runs.get(SPREAD, "two ranks, fewer key-value heads, no folds", **ONE_THREAD_EACH)
    assert ALL_GATHER in (runs.place(SPREAD) / "rank0of2" / "log").read_text()


def test_each_rank_proves_all_matrices(runs):
    """Stages have a part of them."""
    runs.get(SPREAD, "two ranks", **ONE_THREAD_EACH)
    counts = {}
    for number, (name, (*_, engine)) in enumerate(SPREAD.items()):
        counts[name] = len(Reader(runs.place(SPREAD) / f"model{number}").proofs()), engine
    launched = [count for count, engine in counts.values() if engine.items() >= TWO_RANKS.items()]
    logs = {"": [counts["two ranks"][0]] * 2, "rank0of2": launched, "rank1of2": launched}
    for rank, expected in logs.items():
        log = (runs.place(SPREAD) / rank / "log").read_text()
        proved = re.findall(r"(\d+) matrices compute what the checkpoint says", log)
        assert list(map(int, proved))[: len(expected)] == expected and "without a proof" not in log


def test_tensor_parallel_gives_the_tokens_of_one_rank(runs):
    _, one = runs.get(ALONE, "grouped queries")
    _, two = runs.get(SPREAD, "two ranks", **ONE_THREAD_EACH)
    assert [r["tokens"] for r in one] == [r["tokens"] for r in two]
