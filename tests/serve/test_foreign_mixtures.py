"""vLLM on small mixtures that compressed-tensors 0.12 stored, against Hugging Face on what their weights stand for."""

import foreign_mixtures
import pytest
import torch
from compare import check, generate, job_of
from compressed_tensors_writer import needs_writer
from foreign_mixtures import BITMASK, SPARSE
from packed_checkpoints import Packed
from runs import ONE_THREAD_EACH, TWO_RANKS
from test_foreign_experts import arguments
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.slow, needs_writer]

ROUTERS = {"ignored": ("lm_head", "re:.*gate$")}
FLOATS = ROUTERS | {"dtype": torch.float32}
RELOADED, EXPERT_PARALLEL = {"first": "reload"}, {"engine": TWO_RANKS | {"enable_expert_parallel": True}}
ONE_LAYER_DENSE = {"ignored": ("lm_head", "re:.*gate$", "re:.*layers.1.*experts.*")}

# Name of the run: (family, how the checkpoint is written, changes to the job)
ALONE = {
    "bitmask": ("mixtral", Packed("dense", None, sparsity=BITMASK, **FLOATS), {}),
    "plain, one expert not 2:4, reloaded": (
        "qwen3_moe", Packed("dense", None, sparsity=SPARSE, spoiled="1.mlp.experts.2.up_proj", **FLOATS), RELOADED,
    ),
    "marlin-24, int4 in groups, reloaded": ("qwen3_moe", Packed("marlin-24", arguments(4, 128), **ROUTERS), RELOADED),
    "marlin-24, int8 by channel": ("mixtral", Packed("marlin-24", arguments(8), **ROUTERS), {}),
    "marlin-24, int4 by channel, the experts of one layer ignored": (
        "mixtral", Packed("marlin-24", arguments(4), **ONE_LAYER_DENSE), {},
    ),
    "int8 by tensor, the experts of one layer ignored": (
        "qwen3_moe",
        Packed("int-quantized", arguments(8, strategy="tensor"), sparsity=SPARSE, **ONE_LAYER_DENSE), {},
    ),
    "pack-quantized, int4 in groups of 32, with a shared expert": (
        "qwen2_moe", Packed("pack-quantized", arguments(4, 32), sparsity=SPARSE, **ROUTERS), {},
    ),
    "pack-quantized, int8, one expert not 2:4, compiled": (
        "mixtral",
        Packed("pack-quantized", arguments(8), sparsity=SPARSE, spoiled="0.block_sparse_moe.experts.3.w2", **ROUTERS),
        {"engine": {"enforce_eager": False}},
    ),
    "fp8": (
        "qwen3_moe", Packed("float-quantized", arguments(8, kind="float"), sparsity=BITMASK, **ROUTERS), {},
    ),
}  # fmt: skip
SPREAD = {
    "marlin-24, int4 in groups, tensor parallel": (
        "mixtral", Packed("marlin-24", arguments(4, 128), **ROUTERS), {"engine": TWO_RANKS},
    ),
    "pack-quantized, int4 in groups, one expert not 2:4, tensor parallel": (
        "qwen3_moe",
        Packed("pack-quantized", arguments(4, 128), sparsity=SPARSE, spoiled="1.mlp.experts.2.down_proj", **ROUTERS),
        {"engine": TWO_RANKS},
    ),
    "bitmask, int8, expert parallel": (
        "qwen3_moe", Packed("int-quantized", arguments(8), sparsity=BITMASK, **ROUTERS), EXPERT_PARALLEL,
    ),
    "plain, one expert not 2:4, another layer ignored, expert parallel": (
        "mixtral",
        Packed("dense", None, sparsity=SPARSE | {"ignore": ONE_LAYER_DENSE["ignored"]},
               spoiled="0.block_sparse_moe.experts.3.w2", dtype=torch.float32, **ONE_LAYER_DENSE),
        EXPERT_PARALLEL,
    ),
}  # fmt: skip


def run(folder, group, **environment):
    """Name of the run -> (Hugging Face's model, vLLM's results)."""
    written = foreign_mixtures.write(folder, {name: case[:2] for name, case in group.items()})
    jobs = [job_of(written[name][0], job) for name, (_, _, job) in group.items()]
    results = generate(folder / "run", jobs, **environment)
    models = [
        AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager")
        for _, dense in written.values()
    ]
    return dict(zip(group, zip(models, results, strict=True), strict=True))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"), ALONE)


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    return run(tmp_path_factory.mktemp("spread"), SPREAD, **ONE_THREAD_EACH)


@pytest.mark.parametrize("name", ALONE)
def test_one_process(alone, name):
    check(*alone[name])


@pytest.mark.parametrize("name", SPREAD)
def test_two_ranks(spread, name):
    check(*spread[name])


def test_the_log_says_what_is_not_2_of_4(alone, tmp_path_factory):
    log = next(tmp_path_factory.getbasetemp().glob("alone*/run/log")).read_text()
    for layer in ("model.layers.1.mlp.experts", "model.layers.0.block_sparse_moe.experts"):
        assert f"{layer}: config.json says 2:4, but some groups of four have more than two non-zeros" in log
    assert log.count("cpu experts (2)") == 4 and log.count("cpu with fp8 widened to float32 experts (2)") == 1


def test_dummy_weights(tmp_path):
    names = ("plain, one expert not 2:4, reloaded", "int8 by tensor, the experts of one layer ignored")
    written = foreign_mixtures.write(tmp_path, {name: ALONE[name][:2] for name in names})
    jobs = [job_of(folder, {"engine": {"load_format": "dummy"}}) for folder, _ in written.values()]
    for results in generate(tmp_path / "run", jobs):
        assert [len(result["tokens"]) for result in results] == [6, 6, 6]
    assert (tmp_path / "run/log").read_text().count("cpu experts (2)") == 2
