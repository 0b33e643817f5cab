"""Checkpoints of compressed-tensors with scales for an fp8 cache, against vLLM's own serving of the same model, dense.

Rounding keys and values to eight bits moves logprobs by about 0.1 here, so lost scales would show.
"""

import compressed_tensors_checkpoints
import pytest
import torch
from compare import generate, prompts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM has no fp8 cache on this CPU and says so"),
]
SCALES = {"k_scale": 16.0, "v_scale": 64.0}  # coarse enough to make most values subnormal


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kv-cache")
    model = compressed_tensors_checkpoints.write(folder / "pruned", "sparse-24-bitmask")
    compressed_tensors_checkpoints.write(folder / "other", "sparse-24-bitmask")
    compressed_tensors_checkpoints.write(folder / "half", "sparse-24-bitmask")
    compressed_tensors_checkpoints.write_dense(folder / "dense", model)
    compressed_tensors_checkpoints.add_kv_scales(folder / "pruned", **SCALES)
    compressed_tensors_checkpoints.add_kv_scales(folder / "dense", **SCALES)
    compressed_tensors_checkpoints.add_kv_scales(folder / "other", k_scale=1.0, v_scale=1.0)
    compressed_tensors_checkpoints.add_kv_scales(folder / "half", k_scale=1.0)
    jobs = {
        "dense": {},
        "pruned": {},
        "reloaded": {"model": "pruned", "first": "reload"},
        "other": {},
        "half": {},
        "dummy": {"model": "half", "engine": {"load_format": "dummy"}},
    }
    todo = [
        {"prompts": prompts(), "tokens": 6}
        | job
        | {"model": str(folder / job.get("model", name)), "engine": {"dtype": "float32"} | job.get("engine", {})}
        for name, job in jobs.items()
    ]
    return dict(zip(jobs, generate(folder / "run", todo, VLLM_ENABLE_V1_MULTIPROCESSING="0"), strict=True))


def prompt_logprobs(results):
    assert "error" not in results, results
    return torch.tensor([logprob for result in results for logprob in result["prompt"]])


@pytest.mark.parametrize("name", ["pruned", "reloaded"])
def test_scales_are_used(runs, name):
    want = prompt_logprobs(runs["dense"])
    assert (prompt_logprobs(runs[name]) - want).abs().max() < 1e-3
    assert (prompt_logprobs(runs["other"]) - want).abs().mean() > 0.05


def test_a_scale_that_is_missing_is_named(runs):
    assert "RiaError: model.layers.0.self_attn.attn.v_scale is in none of the weight files" in runs["half"]["error"]


def test_dummy_weights_need_none(runs):
    assert [len(result["tokens"]) for result in runs["dummy"]] == [6, 6, 6]
