"""vLLM on small mixtures that compressed-tensors 0.12 stored, against Hugging Face on what their weights stand for."""

import foreign_mixtures
import pytest
import torch
from compare import check, generate, job_of
from compressed_tensors_writer import needs_writer
from foreign_mixtures import BITMASK, SPARSE
from packed_checkpoints import Packed, arguments
from runs import ONE_THREAD_EACH, TWO_RANKS
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.slow, needs_writer]

ROUTERS = {"ignored": ("lm_head", "re:.*gate$")}
FLOATS = ROUTERS | {"dtype": torch.float32}
RELOADED, EXPERT_PARALLEL = {"first": "reload"}, {"engine": TWO_RANKS | {"enable_expert_parallel": True}}
ONE_LAYER_DENSE = {"ignored": ("lm_head", "re:.*gate$", "re:.*layers.1.*experts.*")}

# Name of the run: (family, how the checkpoint is written, changes to the job)
ALONE = {
    "plain, one expert not 2:4, reloaded": (
        "qwen3_moe", Packed("dense", None, sparsity=SPARSE, spoiled="1.mlp.experts.2.up_proj", **FLOATS), RELOADED,
    ),
    "marlin-24, int4 in groups, reloaded": ("qwen3_moe", Packed("marlin-24", arguments(4, 128), **ROUTERS), RELOADED),
    "int8 by tensor, the experts of one layer ignored": (
        "qwen3_moe",
        Packed("int-quantized", arguments(8, strategy="tensor"), sparsity=SPARSE, **ONE_LAYER_DENSE), {},
    ),
    "pack-quantized, int4 in groups of 32, with a shared expert": (
        "qwen2_moe", Packed("pack-quantized", arguments(4, 32), sparsity=SPARSE, **ROUTERS), {},
    ),
    "fp8": (
        "qwen3_moe", Packed("float-quantized", arguments(8, kind="float"), sparsity=BITMASK, **ROUTERS), {},
    ),
}  # fmt: skip
SPREAD = {
    "pack-quantized, int4 in groups, one expert not 2:4, tensor parallel": (
        "qwen3_moe",
        Packed("pack-quantized", arguments(4, 128), sparsity=SPARSE, spoiled="1.mlp.experts.2.down_proj", **ROUTERS),
        {"engine": TWO_RANKS},
    ),
    "bitmask, int8, expert parallel": (
        "qwen3_moe", Packed("int-quantized", arguments(8), sparsity=BITMASK, **ROUTERS), EXPERT_PARALLEL,
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
