"""vLLM on small checkpoints with integer weights against Hugging Face on the weights that these stand for.

In bfloat16 and float16, on whichever kernel is fastest here; in float32 exactly; and by the reference kernel with
inputs rounded to int8, for which Hugging Face's model rounds the inputs of its pruned linears.
"""

import pytest
import torch
from compare import check, differences
from runs import ONE_THREAD_EACH, TWO_RANKS, Runs

from ria_vllm.format.formats import FP8, INTEGERS

pytestmark = pytest.mark.slow

HALF = {"dtype": torch.bfloat16}, {"dtype": "bfloat16"}

# Name of the run: (family, how the checkpoint is written, engine arguments)
ALONE = {one.name: ("llama-gqa", {"weights": one.name} | HALF[0], HALF[1]) for one in (*INTEGERS.values(), FP8)} | {
    "int4-g32 in float32": ("llama-gqa", {"weights": "int4-g32"}, {}),
    "int4-g64 in float32": ("llama-gqa", {"weights": "int4-g64"}, {}),
    "int4-g128 in float32": ("llama-gqa", {"weights": "int4-g128"}, {}),
    "int8-g64, an order for each linear": ("qwen2", {"weights": "int8-g64", "scope": "linear", "folds": False}, {}),
    "int4-g64, fused on disk": ("phi3", {"weights": "int4-g64"}, {}),
    "int4, values in blocks": ("gpt-neox", {"weights": "int4"}, {}),
    "int4-g64, some linears dense": ("llama-gqa", {"weights": "int4-g64", "dense": ("1.mlp.down_proj",)}, {}),
    "int4-g64 compiled": ("llama-gqa", {"weights": "int4-g64"} | HALF[0], HALF[1] | {"enforce_eager": False}),
    "int4-g64 in float16": ("llama-gqa", {"weights": "int4-g64", "dtype": torch.float16}, {"dtype": "float16"}),
}
ROUNDED = {
    name: ("llama-gqa", {"weights": name, "rounded": True}, {})
    for name in ("int8", "int4", "int4-g32", "int4-g128", "int8-g64")
} | {"int4-g64 compiled": ("qwen2", {"weights": "int4-g64", "rounded": True}, {"enforce_eager": False})}
SPREAD = {
    "int4-g64": ("llama-gqa", {"weights": "int4-g64"}, TWO_RANKS),
    "int4-g32 with padding": ("qwen2", {"weights": "int4-g32", "intermediate_size": 192}, TWO_RANKS),
    "int8-g32, no folds": ("llama-mqa", {"weights": "int8-g32", "folds": False}, TWO_RANKS),
    "int4": ("gpt-neox", {"weights": "int4"}, TWO_RANKS),
    "int4-g128": ("llama-gqa", {"weights": "int4-g128"}, TWO_RANKS),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("formats"))


@pytest.mark.parametrize("name", ALONE)
def test_alone(runs, name):
    check(*runs.get(ALONE, name), half=ALONE[name][1].get("dtype") is not None)


def test_float16_is_more_exact_than_bfloat16(runs):
    """Its activations have three more bits, and integers stay what they are: nothing is rounded to bfloat16."""
    names = [f"int4-g64{dtype}" for dtype in ("", " in float16")]
    coarse, fine = (differences(*runs.get(ALONE, name)).mean() for name in names)
    assert fine < coarse / 4
    lines = [line for line in (runs.place(ALONE) / "log").read_text().splitlines() if " widened" in line]
    assert lines and all("fp8" in line for line in lines)  # no kernel for CPUs multiplies these


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_inputs(runs, name):
    """A difference in the last place may round a channel to the next integer, which moves it by a 127th of the largest.

    That happens to few tokens, whose logprobs move by up to 0.06. If only one side rounded, all would, by 0.04 on
    average.
    """
    model, results = runs.get(ROUNDED, name, RIA_VLLM_BACKEND="reference")
    off = differences(model, results)
    assert off.median() < 1e-5 and off.mean() < 5e-3


def test_the_log_says_that_inputs_are_rounded(runs):
    runs.get(ROUNDED, "int8", RIA_VLLM_BACKEND="reference")
    log = (runs.place(ROUNDED) / "log").read_text()
    assert log.count("kernels: reference with inputs rounded to int8 (8)") == len(ROUNDED)


@pytest.mark.parametrize("name", [name for name in SPREAD if name != "int4-g128"])
def test_two_ranks(runs, name):
    check(*runs.get(SPREAD, name, **ONE_THREAD_EACH))


def test_a_cut_through_a_group_is_refused(runs):
    """The 128 channels of o_proj make one group."""
    _, results = runs.get(SPREAD, "int4-g128", **ONE_THREAD_EACH)
    assert "o_proj: 128 input channels over 2 ranks leave 64 each" in results["error"]


def test_two_ranks_give_the_tokens_of_one(runs):
    _, one = runs.get(ALONE, "int4-g64 in float32")
    _, two = runs.get(SPREAD, "int4-g64", **ONE_THREAD_EACH)
    assert [r["tokens"] for r in one] == [r["tokens"] for r in two]
