"""vLLM on small mixtures with pruned experts against Hugging Face on the dense folder with the same weights."""

import mixtures
import pytest
import torch
from compare import check, differences, generate, job_of, prompts
from families import LATENT_ATTENTION, ROTARY
from runs import ONE_THREAD_EACH, TWO_RANKS, TWO_STAGES
from transformers import AutoModelForCausalLM

from ria_vllm.serve.kernels.cpu.experts import CpuExpertsKernel

pytestmark = pytest.mark.slow

SERVED_DENSE = "Pruned experts are served dense"

# Name of the run: (family, how the checkpoint is written, job)
HALF = {"engine": {"dtype": "bfloat16"}}
ENGINES = {
    "qwen3_next": HALF,  # the only dtype of vLLM's linear attention on CPUs
    "qwen3_5_moe_text": HALF,
    "deepseek_v2": {"engine": LATENT_ATTENTION},
}
ALONE = {name: (name, {}, ENGINES.get(name, {})) for name in mixtures.FAMILIES} | {
    "int8": ("qwen3_moe", {"weights": "int8"}, {}),
    "int4": ("mixtral", {"weights": "int4"}, {}),
    "int8, weighted inputs": ("llama4", {"weights": "int8"}, {}),
    "int4-g32 with biases": ("gpt_oss", {"weights": "int4-g32"}, {}),
    "int4-g64": ("qwen2_moe", {"weights": "int4-g64"}, {}),
    "int4-g64, an order for each linear": ("olmoe", {"weights": "int4-g64", "scope": "linear", "folds": False}, {}),
    "int4-g32 in bfloat16": ("qwen3_moe", {"weights": "int4-g32", "dtype": torch.bfloat16}, HALF),
    "int4-g64 in bfloat16": ("qwen3_moe", {"weights": "int4-g64", "dtype": torch.bfloat16}, HALF),
    "int4-g32, reload": ("qwen3_moe", {"weights": "int4-g32"}, {"first": "reload"}),
    "int4-g32, compiled": ("qwen3_moe", {"weights": "int4-g32"}, {"engine": {"enforce_eager": False}}),
    "an order for each linear": ("olmoe", {"scope": "linear", "folds": False}, {}),
    "the experts of one layer dense": ("gpt_oss", {"dense_layer": 1}, {}),
    "no permutations": ("granitemoe", {"scope": "none"}, {}),
    "compiled": ("qwen2_moe", {}, {"engine": {"enforce_eager": False}}),
    "reload": ("mixtral", {}, {"first": "reload"}),
    "reload with biases": ("gpt_oss", {}, {"first": "reload"}),
}
# The oracle is the compressed folder in transformers, which rounds in the same places.
ROUNDED = {
    "W8A8": ("qwen3_moe", {"weights": "int8"}, {}),
    "W8A8, weighted inputs": ("llama4", {"weights": "int8"}, {}),
    "W4A8": ("qwen2_moe", {"weights": "int4"}, {}),
    "W4A8 with groups": ("mixtral", {"weights": "int4-g32"}, {"engine": {"enforce_eager": False}}),
    "W4A8 with biases": ("gpt_oss", {"weights": "int4-g64"}, {}),
}
SPREAD = {
    "tensor parallel": ("qwen3_moe", {}, {"engine": TWO_RANKS}),
    "tensor parallel, with a router of the model's own": ("gemma4_text", {}, {"engine": TWO_RANKS}),
    "tensor parallel, weighted inputs": ("llama4", {}, {"engine": TWO_RANKS}),
    "tensor parallel with biases": ("gpt_oss", {}, {"engine": TWO_RANKS}),
    "expert parallel": ("mixtral", {}, {"engine": TWO_RANKS | {"enable_expert_parallel": True}}),
    "expert parallel, weighted inputs": ("llama4", {}, {"engine": TWO_RANKS | {"enable_expert_parallel": True}}),
    "expert parallel with biases": ("gpt_oss", {}, {"engine": TWO_RANKS | {"enable_expert_parallel": True}}),
    "two stages": ("qwen3_moe", {}, {"engine": TWO_STAGES, "prompt_logprobs": False}),
    "tensor parallel, int4-g32": ("qwen3_moe", {"weights": "int4-g32"}, {"engine": TWO_RANKS}),
    "expert parallel, int4-g64": (
        "mixtral",
        {"weights": "int4-g64"},
        {"engine": TWO_RANKS | {"enable_expert_parallel": True}},
    ),
}


def run(folder, group, **environment):
    """Name of the run -> (Hugging Face's model, vLLM's results)."""
    models, jobs = {}, []
    for number, (name, (family, written, job)) in enumerate(group.items()):
        compressed, dense = mixtures.write(mixtures.FAMILIES[family], folder / str(number), **written)
        oracle = compressed if written.get("rounded") else dense
        models[name] = AutoModelForCausalLM.from_pretrained(oracle, dtype=torch.float32, attn_implementation="eager")
        jobs.append(job_of(compressed, job))
    results = generate(folder / "run", jobs, **environment)
    return {name: (model, result) for (name, model), result in zip(models.items(), results, strict=True)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"), ALONE)


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    return run(tmp_path_factory.mktemp("spread"), SPREAD, **ONE_THREAD_EACH)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    group = {name: (family, written | {"rounded": True}, job) for name, (family, written, job) in ROUNDED.items()}
    return run(tmp_path_factory.mktemp("rounded"), group)


@pytest.mark.parametrize("name", ALONE)
def test_one_process(alone, name):
    check(*alone[name], half=ALONE[name][2].get("engine", {}).get("dtype") == "bfloat16")


@pytest.mark.parametrize("name", SPREAD)
def test_several_processes(spread, name):
    check(*spread[name])


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_inputs(rounded, name):
    """The bounds are those of linears, see test_vllm_formats.py: few tokens round a channel to another integer."""
    off = differences(*rounded[name])
    assert off.median() < 1e-5 and off.mean() < 5e-3


def test_the_log_says_that_inputs_of_experts_are_rounded(rounded, tmp_path_factory):
    log = next(tmp_path_factory.getbasetemp().glob("rounded*/run/log")).read_text()
    assert log.count("cpu with inputs rounded to int8 experts (2)") == len(ROUNDED)
    assert "not rounded" not in log


def test_latent_attention_in_bfloat16(tmp_path):
    """Against the dense model in the same engine: in bfloat16, both are as far from transformers as each other."""
    folders = mixtures.write(mixtures.FAMILIES["deepseek_v2"], tmp_path, dtype=torch.bfloat16)
    engine = ROTARY | {"dtype": "bfloat16"}
    jobs = [{"model": str(folder), "prompts": prompts(), "tokens": 1, "engine": engine} for folder in folders]
    results = generate(tmp_path / "run", jobs)
    assert not [result["error"] for result in results if "error" in result]
    ours, theirs = (torch.cat([torch.tensor(one["prompt"]) for one in result]) for result in results)
    off = (ours - theirs).abs()
    assert off.max() < 0.15 and off.mean() < 0.05
    model = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32, attn_implementation="eager")
    assert differences(model, results[0]).median() < 0.1


def test_dummy_weights(tmp_path):
    compressed, _ = mixtures.write(mixtures.FAMILIES["qwen3_moe"], tmp_path)
    job = {"model": str(compressed), "prompts": prompts(), "tokens": 2, "engine": {"load_format": "dummy"}}
    (results,) = generate(tmp_path / "run", [job])
    assert [len(result["tokens"]) for result in results] == [2, 2, 2]
    log = (tmp_path / "run/log").read_text()
    # Though the model has two layers of experts.
    assert (log.count("cpu experts (2)"), log.count(SERVED_DENSE)) in ((1, 0), (0, 1))


def test_the_log_says_who_serves_the_experts(alone, tmp_path_factory):
    log = next(tmp_path_factory.getbasetemp().glob("alone*/run/log")).read_text()
    served_dense = CpuExpertsKernel.is_supported(torch.device("cpu")) is not None
    assert ("cpu experts (2)" in log) != served_dense
    # Without a kernel, or if gate and up of the experts read their input in different orders: each model says how many
    # layers are served so, and the first one in a process that this costs the savings.
    assert log.count("dense experts (") >= 2 and log.count(SERVED_DENSE) == 1
