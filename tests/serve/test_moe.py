"""vLLM on small MoE models with pruned experts against Hugging Face on the dense folder with the same weights.

The zoo has what `compress` makes of other types.
"""

import pruned_moe
import pytest
import torch
from compare import check, differences, generate, job_of
from runs import ONE_THREAD_EACH, TWO_RANKS, TWO_STAGES
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

EXPERT_PARALLEL = {"engine": TWO_RANKS | {"enable_expert_parallel": True}}
# Name of the run: (family, how the checkpoint is written, job)
ALONE = {
    "shared expert, int4-g64": ("qwen2_moe", {"weights": "int4-g64"}, {}),
    "no folds": ("qwen3_moe", {"folds": False}, {}),
    "a router of the model's own": ("gemma4_text", {}, {}),
    "weighted inputs, int8": ("llama4", {"weights": "int8"}, {}),
    "biases, int4-g32": ("gpt_oss", {"weights": "int4-g32"}, {}),
    "the experts of one layer dense": ("gpt_oss", {"dense_layer": 1}, {}),
    "no permutations": ("granitemoe", {"permuted": False}, {}),
    "int4-g32, compiled": ("qwen3_moe", {"weights": "int4-g32"}, {"engine": {"enforce_eager": False}}),
}  # fmt: skip
# The oracle is the compressed folder in transformers, which rounds in the same places.
ROUNDED = {
    "W8A8, weighted inputs": ("llama4", {"weights": "int8", "rounded": True}, {}),
    "W4A8 with biases": ("gpt_oss", {"weights": "int4-g64", "rounded": True}, {}),
}
SPREAD = {
    "tensor parallel, int4-g32": ("qwen3_moe", {"weights": "int4-g32"}, {"engine": TWO_RANKS}),
    "tensor parallel, weighted inputs": ("llama4", {}, {"engine": TWO_RANKS}),
    "expert parallel, int4-g64": ("mixtral", {"weights": "int4-g64"}, EXPERT_PARALLEL),
    "expert parallel with biases": ("gpt_oss", {}, EXPERT_PARALLEL),
    "two stages": ("qwen3_moe", {}, {"engine": TWO_STAGES, "prompt_logprobs": False}),
}


def run(folder, group, **environment):
    """Name of the run -> (Hugging Face's model, vLLM's results)."""
    models, jobs = {}, []
    for number, (name, (family, written, job)) in enumerate(group.items()):
        compressed, dense = pruned_moe.write(pruned_moe.FAMILIES[family], folder / str(number), **written)
        oracle = compressed if written.get("rounded") else dense
        models[name] = AutoModelForCausalLM.from_pretrained(oracle, dtype=torch.float32, attn_implementation="eager")
        jobs.append(job_of(compressed, job))
    results = generate(folder / "run", jobs, **environment)
    return {name: (model, result) for (name, model), result in zip(models.items(), results, strict=True)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"), ALONE | ROUNDED)


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    return run(tmp_path_factory.mktemp("spread"), SPREAD, **ONE_THREAD_EACH)


@pytest.mark.parametrize("name", ALONE)
def test_one_process(alone, name):
    check(*alone[name])


@pytest.mark.parametrize("name", SPREAD)
def test_several_processes(spread, name):
    check(*spread[name])


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_inputs(alone, name):
    """The bounds are those of linears, see test_vllm.py: few tokens round a channel to another integer."""
    off = differences(*alone[name])
    assert off.median() < 1e-5 and off.mean() < 5e-3
